"""`rsafe translate`: policies of other guards and rail configs made policies of this one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import click
from rich.table import Table
from rich.text import Text

from rsafe_plugins import Content, Policy
from rsafe_plugins.commands import common
from rsafe_plugins.commands.check import FAILED
from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import Category, files
from rsafe_plugins.policy.taxonomies import corresponding, taxonomy_names
from rsafe_plugins.policy.translate import FORMATS, Entry, Format, NoPolicyError, Translation
from rsafe_plugins.policy.translate import translate as read
from rsafe_plugins.policy.translate.write import llama_guard_prompt, nemo_config, safeguard_policy

_RENDER = {
    "policy": Policy.to_yaml,
    "gpt-oss-safeguard": safeguard_policy,
    "llama-guard": llama_guard_prompt,
}
_TARGETS = ("policy", "nemo", "gpt-oss-safeguard", "llama-guard")


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option(
    "--format", "format_name", type=click.Choice(FORMATS), help="How to read it; recognized by default."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="A file, or a folder where there are several policies.",
)
@click.option(
    "--to",
    type=click.Choice((*_TARGETS, *taxonomy_names())),
    default="policy",
    help="What to make of it; a taxonomy shows which of its categories correspond.",
)
@click.option("--report", is_flag=True, help="Show what became of each piece of text.")
@click.option("--strict", is_flag=True, help="Fail if anything was found of which nobody knows what it is.")
@click.option(
    "--check",
    is_flag=True,
    help="Judge the source's own examples by it; status 1 if the guard disagrees, 3 if it fails.",
)
@click.option("--backend", help="The guard's engine for --check.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def translate(
    source: str,
    format_name: str | None,
    out: Path | None,
    to: str,
    report: bool,
    strict: bool,
    check: bool,
    backend: str | None,
    as_json: bool,
) -> int:
    """Makes policies of what SOURCE says is forbidden.

    SOURCE is a rail config's folder of NeMo Guardrails, or a file: a list of categories as Llama Guard or
    Nemotron take it, a policy document of gpt-oss-safeguard, names of OpenAI's or Perspective's categories, a spec of
    guardrails-ai, bullets, or a policy of this package. Nothing in it is ever run.
    """
    if check and (out is not None or report or to != _TARGETS[0]):
        raise click.UsageError(
            "--check judges examples and writes nothing: leave --to, --out and --report out."
        )
    if backend is not None and not check:
        raise click.UsageError("--backend is the engine for --check.")
    try:
        translation = read(source, format=cast(Format | None, format_name))
    except NoPolicyError as error:
        if as_json:
            common.print_json({"policies": [], "report": _report_json(error.report)})
        elif report:
            _print_report(error.report)
        raise
    if strict and translation.unplaced:
        first = translation.unplaced[0]
        raise PolicyError(
            f"{first.piece.place}: nobody knows what this is ({len(translation.unplaced)} such pieces): "
            f"{first.piece.text[:80]!r}."
        )
    if check:
        return _check(translation, backend, as_json)
    policies = list(translation.policies.values())
    if as_json:
        common.print_json(_as_json(translation))
    if to in taxonomy_names():
        if not as_json:
            _print_correspondence(policies, to)
        return 0
    if to == "nemo":
        if out is None:
            raise click.UsageError("--to nemo writes a folder: name it with --out.")
        written = nemo_config(policies, out)
    else:
        written = _write(policies, out, to, Path(source)) if out is not None else []
        if out is None and not as_json:
            click.echo("\n---\n".join(map(_RENDER[to], policies)), nl=False)
    if not as_json:
        _print_summary(translation, written, report)
    return 0


def _write(policies: list[Policy], out: Path, to: str, source: Path) -> list[Path]:
    suffix = {"policy": ".yaml", "gpt-oss-safeguard": ".md", "llama-guard": ".txt"}[to]
    if len(policies) == 1 and out.suffix:
        paths = [out]
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolicyError(
                f"{out}: there are {len(policies)} policies, and no folder can be made ({error.strerror})."
            ) from None
        paths = [out / f"{name}{suffix}" for name in _file_names(policy.name for policy in policies)]
    if any(path.exists() and path.samefile(source) for path in paths):
        raise PolicyError(f"{source}: this is what is translated; name another file with --out.")
    for path, policy in zip(paths, policies, strict=True):
        if to == "policy":
            policy.save(path)
        else:
            files.write_text(path, _RENDER[to](policy))
    return paths


def _file_names(names: Iterable[str]) -> list[str]:
    """A name for each policy's file, without what could lead out of the folder."""
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        safe = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:100] or "policy"
        distinct, number = safe, 2
        while distinct.casefold() in taken:
            distinct, number = f"{safe}-{number}", number + 1
        taken.add(distinct.casefold())
        found.append(distinct)
    return found


def _as_json(translation: Translation) -> dict[str, Any]:
    return {
        "format": translation.format,
        "policies": [
            policy.model_dump(mode="json", exclude_defaults=True) for policy in translation.policies.values()
        ],
        "report": _report_json(translation.report),
    }


def _report_json(report: Iterable[Entry]) -> list[dict[str, Any]]:
    return [
        {
            "file": entry.piece.file,
            "line": entry.piece.line,
            "key": entry.piece.key,
            "text": entry.piece.text,
            "went": entry.went,
            "reason": entry.reason,
        }
        for entry in report
    ]


def _print_summary(translation: Translation, written: list[Path], report: bool) -> None:
    # To standard error, since the policies go to standard output.
    console = common.console(stderr=True)
    if report:
        _print_report(translation.report)
    placed = sum(bool(entry.went) for entry in translation.report)
    reasons = sum(bool(entry.reason) for entry in translation.report)
    for policy in translation.policies.values():
        kinds = sorted({kind for category in policy.categories for kind in category.applies_to})
        number = len(policy.categories)
        line = f"{policy.name}: {number} categories, for {', '.join(kinds)}"
        console.print(Text(common.printable(line)), soft_wrap=True)
    console.print(
        Text(
            f"Read as {translation.format}: {len(translation.report)} pieces of text, {placed} became policy, "
            f"{reasons} are none, {len(translation.unplaced)} unknown"
            + ("." if report else "; --report shows each.")
        ),
        soft_wrap=True,
    )
    for path in written:
        console.print(Text(common.printable(f"wrote {path}")), soft_wrap=True)


def _print_report(report: Iterable[Entry]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("place", "text", "what became of it"):
        table.add_column(column, overflow="fold")
    for entry in report:
        table.add_row(
            *map(Text, map(common.printable, (entry.piece.place, entry.piece.text, _became(entry))))
        )
    common.console(stderr=True).print(table)


def _became(entry: Entry) -> str:
    return entry.went or (f"no policy: {entry.reason}" if entry.reason else "UNKNOWN")


def _print_correspondence(policies: list[Policy], to: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("category")
    table.add_column(to)
    for policy in policies:
        for category in policy.categories:
            found = _corresponding(policy, category, to)
            table.add_row(
                Text(common.printable(f"{category.id} {category.name}")), Text(", ".join(found) or "-")
            )
    common.console().print(table)


def _corresponding(policy: Policy, category: Category, to: str) -> tuple[str, ...]:
    """By the taxonomy that the policy is one of; else by the first in which something corresponds to its name.

    Ids say nothing without their taxonomy: S2 is one thing for Llama Guard and another one for Nemotron.
    """
    if policy.name in taxonomy_names():
        return corresponding(category.id, policy.name, to) or corresponding(category.name, policy.name, to)
    for taxonomy in taxonomy_names():
        name = category.name
        if taxonomy in Policy.builtin_names():  # these have ids
            named = {one.name.casefold(): one.id for one in Policy.load(taxonomy).categories}
            name = named.get(category.name.casefold(), "")
        if found := corresponding(name, taxonomy, to):
            return found
    return ()


def _check(translation: Translation, backend: str | None, as_json: bool) -> int:
    disagreements = []
    asked = 0
    for policy in translation.policies.values():
        labelled = [
            (category, text, is_unsafe)
            for category in policy.categories
            for is_unsafe, texts in ((True, category.examples), (False, category.allowed_examples))
            for text in texts
        ]
        # The guard must not find the answers in its prompt.
        bare = policy.model_copy(
            update={
                "categories": [
                    one.model_copy(update={"examples": (), "allowed_examples": ()})
                    for one in policy.categories
                ]
            }
        )
        guard = common.make_guard(policy=bare, backend=backend)
        verdicts = guard.check_many(Content(category.applies_to[0], text) for category, text, _ in labelled)
        asked += len(labelled)
        for (category, text, is_unsafe), verdict in zip(labelled, verdicts, strict=True):
            if verdict.label != ("unsafe" if is_unsafe else "safe"):
                disagreements.append(
                    {
                        "policy": policy.name,
                        "category": category.id,
                        "text": text,
                        "expected": "unsafe" if is_unsafe else "safe",
                        "label": verdict.label,
                        "score": verdict.score,
                        "error": verdict.error,
                    }
                )
    if not asked:
        raise click.UsageError("--check judges the examples of a policy, and there are none.")
    if as_json:
        common.print_json({"examples": asked, "disagreements": disagreements})
    else:
        console = common.console()
        for one in disagreements:
            says = f"expected {one['expected']}, the guard says {one['label'] or one['error']}"
            line = f"{one['policy']} {one['category']}: {says}: {one['text']}"
            console.print(Text(common.printable(line)), soft_wrap=True)
        console.print(Text(f"{asked} examples, the guard disagrees on {len(disagreements)}."))
    if any(one["label"] is None for one in disagreements):
        return FAILED
    return 1 if disagreements else 0
