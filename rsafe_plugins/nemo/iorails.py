"""The input and output rails in NeMo's engine without Colang, IORails.

That engine runs only rails that NeMo's own catalog lists, and has no public way to add one. So ours are added to the
catalog itself, on request and only in versions where that was tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nemoguardrails import RailsConfig
from nemoguardrails.actions.rail_outcome import RailOutcome

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.nemo.actions import RailActions
from rsafe_plugins.nemo.config import guards_from_config
from rsafe_plugins.nemo.guards import flow_of

_TESTED = "0.24."
_MANIFEST = "rsafe"
_actions: dict[int, RailActions] = {}


def enable_iorails() -> None:
    """Lets `Guardrails` run configs with `rsafe check input` and `rsafe check output` on IORails.

    Call it before the first `Guardrails(config)`; called again it does nothing. Configs with any other of our rails
    go on running on `LLMRails`.

    Raises:
        SettingsError: The installed nemoguardrails isn't one that this was tested with.
    """
    installed = version("nemoguardrails")
    if not installed.startswith(_TESTED):
        raise SettingsError(
            f"enable_iorails needs nemoguardrails {_TESTED}x, since it changes what is not public there, and "
            f"{installed} is installed: leave the call out, and the rails run on LLMRails."
        )
    from nemoguardrails.manifests import registry
    from nemoguardrails.manifests.catalog import RailCatalog, RailManifestRecord

    known = registry.default_rail_catalog()
    if _MANIFEST not in known.manifests:
        record = RailManifestRecord(manifest=_manifest(), source=__name__)
        registry._catalog = RailCatalog([*known.records.values(), record])


async def check_input(
    text: str,
    policy: str | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    config: RailsConfig | None = None,
) -> RailOutcome:
    """The action of the input rail.

    Args:
        text: The user's message.
        policy: The policy that the flow was given.
        events: What was said before that message.
        config: The rail config.

    Raises:
        RSafeError: The config's settings can't be used, or the check failed and `on_error` is `raise`.
    """
    return await _actions_of(config).check_prompt(text, policy, events, config)


async def check_output(
    text: str,
    prompt: str,
    policy: str | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    config: RailsConfig | None = None,
) -> RailOutcome:
    """The action of the output rail.

    Args:
        text: The answer, or what of it is about to be streamed.
        prompt: The user's message.
        policy: The policy that the flow was given.
        events: What was said before that message.
        config: The rail config.

    Raises:
        RSafeError: The config's settings can't be used, or the check failed and `on_error` is `raise`.
    """
    return await _actions_of(config).check_answer(text, prompt, policy, events, config)


def _actions_of(config: RailsConfig | None) -> RailActions:
    """The actions of an app, which this engine has no place for, by the config that it hands over."""
    if config is None:
        raise SettingsError("IORails must hand its config to the rail, and it handed over none.")
    key = id(config)
    if key not in _actions:
        _actions[key] = RailActions(guards_from_config(config))
        weakref.finalize(config, _actions.pop, key, None)
    return _actions[key]


def _manifest() -> Any:
    from nemoguardrails import manifests
    from nemoguardrails.manifests import ActionRef, Binding, RailDirection, RailSurface

    policy = Binding.surface_param("policy", "policy", required=False)
    said = Binding.context("text", "user_message")
    answered = (Binding.context("text", "bot_message"), Binding.context("prompt", "user_message"))
    surfaces = (
        RailSurface(
            name=flow_of("input"),
            direction=RailDirection.INPUT,
            action=ActionRef(name="rsafe_check_input", target=f"{__name__}:{check_input.__name__}"),
            bindings=(said, policy),
        ),
        RailSurface(
            name=flow_of("output"),
            direction=RailDirection.OUTPUT,
            action=ActionRef(name="rsafe_check_output", target=f"{__name__}:{check_output.__name__}"),
            bindings=(*answered, policy),
        ),
    )
    spec = manifests.RailSpec(
        flows=manifests.RailFlows(flow_names=tuple(surface.name for surface in surfaces)),
        actions=manifests.RailActions(refs=tuple(surface.action for surface in surfaces)),
        surfaces=surfaces,
    )
    return manifests.RailManifest(name=_MANIFEST, spec=spec)
