"""`rsafe doctor`: what works, what is missing, and the command that mends it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import click
from rich.text import Text

from rsafe_plugins import BackendUnavailable, Policy, PolicyError, RSafeError, SettingsError
from rsafe_plugins.backends import backend_from_string
from rsafe_plugins.backends.openai import KEY_VARIABLES
from rsafe_plugins.backends.weights import (
    CACHE_VARIABLE,
    MODEL_VARIABLE,
    chosen_model,
    describe_weights,
    verify_weights,
)
from rsafe_plugins.commands import common
from rsafe_plugins.guard import GuardSettings

WORKS, FAILED = 0, 3

# What can be installed beside the embedded guard, and the extra that brings it.
OPTIONAL = {
    "nemoguardrails": "nemo",
    "langchain-core": "langchain",
    "llama-index-core": "llama-index",
    "transformers": "transformers",
    "torch": "transformers",
    "openai": "openai",
    "scikit-learn": "eval",
    "scipy": "eval",
    "peft": "align",
}

_FETCH = shlex.join([sys.executable, "-m", "rsafe_plugins.cli", "check", "--backend", "embedded", "hello"])


_OWN_POLICY = (
    "the embedded guard follows it in part: it finds what is harmful in general, and often, not always, leaves alone "
    "what falls under a category of rsafe-18 that your policy leaves out; of categories that rsafe-18 doesn't have it "
    "knows nothing (see its model card): where that matters, name a larger guard model as the backend"
)
# Backends that load a model in this process, which may take minutes.
_LARGE = ("transformers", "vllm")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        ok: Whether it is as it should be; None for what the embedded guard doesn't need.
        detail: What was found, in a few words.
        mend: The command that mends it, or what to do.
    """

    name: str
    ok: bool | None
    detail: str
    mend: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def doctor(as_json: bool) -> int:
    """Shows what works, what is missing, and how to mend it.

    Exit status: 0 the embedded guard works, and so do your settings and their backend; 3 something is wrong.
    """
    embedded = list(_embedded_guard())
    findings = [*embedded, *_settings(), *_optional()]
    works = all(finding.ok is not False for finding in findings)
    if as_json:
        common.print_json({"works": works, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings, works)
    return WORKS if works else FAILED


def _embedded_guard() -> Iterator[Finding]:
    yield Finding("python", True, f"{platform.python_version()}, {sys.executable}")
    yield Finding("rsafe-plugins", True, version("rsafe-plugins"))
    engine = _installed("xllamacpp")
    yield Finding(
        "engine xllamacpp",
        engine is not None,
        engine or "not installed",
        None if engine else _pip("embedded"),
    )
    weights = _weights()
    yield weights
    yield _adapter()
    if engine is not None and weights.ok:
        yield from _verdict()


def _weights() -> Finding:
    weights = describe_weights()
    if chosen_model() is not None:
        mend = None if weights.present else f"set {MODEL_VARIABLE} to a GGUF file, or unset it"
        return Finding("weights", weights.present, f"{weights.path} ({MODEL_VARIABLE})", mend)
    if not weights.present:
        detail = f"not fetched yet: {weights.size / 1e6:.0f} MB, {weights.source}"
        return Finding("weights", False, detail, _FETCH)
    try:
        verify_weights()
    except BackendUnavailable as error:
        return Finding("weights", False, str(error), f"rm {shlex.quote(str(weights.path))} && {_FETCH}")
    return Finding("weights", True, f"{weights.path}, {weights.size / 1e6:.0f} MB, SHA-256 verified")


def _adapter() -> Finding:
    if chosen_model() is not None:
        return Finding("adapter", None, f"not used with {MODEL_VARIABLE}")
    adapters = sorted(path.name for path in Path(str(files("rsafe_plugins.backends"))).glob("data/*.gguf"))
    if not adapters:
        return Finding("adapter", False, "missing from the package", _pip("embedded", "--force-reinstall"))
    return Finding("adapter", True, ", ".join(adapters))


def _verdict() -> Iterator[Finding]:
    try:
        guard = common.make_guard(backend="embedded", policy="rsafe-18", reasoning="never", on_error="raise")
        verdict = guard.check("What is the capital of France?")
    except RSafeError as error:
        yield Finding("a verdict", False, str(error))
    else:
        yield Finding("a verdict", True, f"{verdict.label}, in {verdict.latency_ms / 1000:.2f} s")
        if chosen_model() is None:
            yield Finding("your own policy", None, _OWN_POLICY)


def _settings() -> Iterator[Finding]:
    variables = sorted(name for name in os.environ if name.startswith("RSAFE_"))
    known = {f"RSAFE_{name.upper()}" for name in GuardSettings.model_fields} | {
        MODEL_VARIABLE,
        CACHE_VARIABLE,
        *KEY_VARIABLES,
    }
    for name in sorted(set(variables) - known):
        yield Finding("settings", False, f"{name} is no setting of the guard", f"unset {name}")
    sources = [*variables, *(["rsafe.yaml"] if Path("rsafe.yaml").exists() else [])]
    try:
        settings = GuardSettings.read({})
        policy = settings.policy if isinstance(settings.policy, Policy) else Policy.load(settings.policy)
        if isinstance(settings.backend, str):
            backend_from_string(settings.backend)  # starts nothing
    except (SettingsError, PolicyError) as error:
        yield Finding("settings", False, str(error), f"correct it in {' or '.join(sources)}")
        return
    in_force = {"policy": policy.name, "backend": _without_password(str(settings.backend))}
    in_force |= settings.model_dump(exclude={"policy", "backend"}, exclude_none=True)
    shown = ", ".join(f"{name}={value}" for name, value in in_force.items())
    yield Finding("settings", True, f"{shown} (from {', '.join(sources) or 'the defaults'})")
    if isinstance(settings.backend, str) and settings.backend != "embedded":
        yield _own_backend(settings.backend, " or ".join(sources))


def _own_backend(backend: str, sources: str) -> Finding:
    """Whether the engine of the settings gives a verdict, where that doesn't load a large model."""
    kind = backend.partition(":")[0]
    if kind in _LARGE:
        return Finding("your backend", None, f"not tried: {kind} loads its model first", "rsafe check Hello")
    try:
        verdict = common.make_guard(on_error="raise").check("What is the capital of France?")
    except RSafeError as error:
        return Finding("your backend", False, _without_password(str(error)), f"correct it in {sources}")
    return Finding("your backend", True, f"{verdict.label}, in {verdict.latency_ms / 1000:.2f} s")


def _optional() -> Iterator[Finding]:
    for package, extra in OPTIONAL.items():
        found = _installed(package)
        yield Finding(package, None, found or "not installed", None if found else _pip(extra))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _pip(extra: str, *options: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *options, f"rsafe-plugins[{extra}]"])


def _without_password(backend: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", backend)


def _print(findings: list[Finding], works: bool) -> None:
    console = common.console()
    marks = {True: Text("ok   ", style="green"), False: Text("WRONG", style="bold red"), None: Text("     ")}
    for finding in findings:
        line = Text.assemble(
            marks[finding.ok], f" {finding.name:<17}", common.printable(" ".join(finding.detail.split()))
        )
        console.print(line, soft_wrap=True)
        if finding.mend:
            # Whole, on a line of its own: to be copied.
            console.print(Text(f"{'':<6}> {common.printable(finding.mend)}", style="cyan"), soft_wrap=True)
    outcome = "The guard works." if works else "The guard does not work as it is set up."
    console.print(Text(outcome, style="bold green" if works else "bold red"))
