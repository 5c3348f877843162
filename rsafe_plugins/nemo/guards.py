"""Which guard judges for which rail."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from nemoguardrails import RailsConfig
from nemoguardrails.colang.v2_x.lang.colang_ast import Element, Spec
from nemoguardrails.rails.llm.utils import get_action_details_from_flow_id

from rsafe_plugins.errors import PolicyError, SettingsError
from rsafe_plugins.guard import Guard, GuardSettings
from rsafe_plugins.policy import ContentKind, Policy

log = logging.getLogger(__name__)

Rail = Literal["input", "output", "retrieval", "tool_call", "tool_result"]
RAILS: tuple[Rail, ...] = get_args(Rail)

_KINDS: dict[Rail, ContentKind] = {
    "input": "prompt",
    "output": "response",
    "retrieval": "document",
    "tool_call": "tool_call",
    "tool_result": "tool_result",
}
_SECTIONS: dict[Rail, str] = {
    "input": "input",
    "output": "output",
    "retrieval": "retrieval",
    "tool_call": "tool_output",
    "tool_result": "tool_input",
}
# Sections whose flows NeMo runs, or refuses, in Colang 2.
_READ_IN_COLANG_2: tuple[Rail, ...] = ("input", "output")
# Flows that the package's library has for Colang 1.0.
_OF_LIBRARY = re.compile(r"rsafe |run tool input rails$")
_CHECKS_OUTPUT = re.compile(r"rsafe\s+check\s+output|RsafeCheckOutputAction")
# In the code of Colang 2: text without variables in it, and what its flows are given, which is no policy.
_LITERAL = re.compile(r"""(["'])(?P<text>[^"'{}]+)\1""")
_TEXTS = ("$input_text", "$output_text", "$user_message", "$bot_message")
_FLOW = re.compile(r"\s*([^$(]*?)\s*([$(].*)?", re.DOTALL)
_POLICY = re.compile(r"""(?:\$policy\s*=|\(\s*\$?policy\s*=)\s*(["']?)([^"',$)\s]+)\1\s*\)?\s*""")


def flow_of(rail: Rail) -> str:
    """The name of a rail's flow."""
    return f"rsafe check {rail.replace('_', ' ')}"


_OURS = {flow_of(rail): rail for rail in RAILS}


def name_of(flow: str) -> str:
    """The name of a flow as a config has it, without its parameters."""
    name = _FLOW.fullmatch(flow)
    return name[1] if name else flow


def policies_in(config: RailsConfig, rail: Rail) -> list[str | None]:
    """The policy of each of our flows in this rail of the config; None where it names none.

    Raises:
        SettingsError: One of our flows has another parameter.
    """
    return [_policy_in(flow) for flow in _flows(config, rail) if name_of(flow) == flow_of(rail)]


def has_output_rail(config: RailsConfig) -> bool:
    """Whether our rail judges answers; in Colang 2, where rails stand in code, whether that names it."""
    is_named = bool(policies_in(config, "output"))
    if is_named or config.colang_version == "1.0":
        return is_named
    flows = (flow for flow in config.flows if getattr(flow, "name", None) != flow_of("output"))
    return any(_CHECKS_OUTPUT.search(str(getattr(flow, "source_code", ""))) for flow in flows)


def _flows(config: RailsConfig, rail: Rail) -> list[str]:
    flows: list[str] = getattr(config.rails, _SECTIONS[rail]).flows
    return flows


def _policy_in(flow: str) -> str | None:
    name = _FLOW.fullmatch(flow)
    given = name[2] if name else None
    if given is None:
        return None
    policy = _POLICY.fullmatch(given)
    if policy is None:
        raise SettingsError(
            f"The flow '{name_of(flow)}' takes nothing but a policy, as in '{name_of(flow)} $policy=mlcommons', "
            f"not {given!r}."
        )
    return policy[2]


class RailGuards:
    """The guards of an app: one for each policy that a rail names, all with the same engine and settings.

    Args:
        default: The guard of the rails that name no policy.
        policies: The policy of a rail's guard where its flow names none: a policy, or what `find` takes.
        find: What a policy's name or path means in this app.
    """

    def __init__(
        self,
        default: Guard,
        policies: Mapping[Rail, Policy | str | Path] | None = None,
        find: Callable[[str | Path], Policy] = Policy.load,
    ) -> None:
        self.default = default
        self._policies = dict(policies or {})
        self._find = find
        self._guards: dict[str, Guard] = {}

    def of(self, rail: Rail, policy: object = None, config: RailsConfig | None = None) -> Guard:
        """The guard of a rail.

        Args:
            rail: The rail.
            policy: What its action was given. Clients can set NeMo's variables, so that in Colang 1.0 it counts
                only where the config names several policies for the rail, and only if it is one of them.
            config: The rail config.

        Raises:
            SettingsError: It is none of them.
            PolicyError: The policy can't be found or read.
        """
        in_code = config is not None and config.colang_version != "1.0"
        if in_code and policy is not None and not (isinstance(policy, str) and policy.strip()):
            raise SettingsError(
                f"The flow '{flow_of(rail)}' takes a policy's name or path as $policy, not {policy!r}."
            )
        given = policy if isinstance(policy, str) and (in_code or not policy.startswith("$")) else None
        if config is not None:
            named = policies_in(config, rail)
            if len(named) > 1 and given not in named:
                raise SettingsError(
                    f"The flow '{flow_of(rail)}' must be given one of the policies {named}, not {given!r}."
                )
            if len(named) <= 1 and config.colang_version == "1.0":
                given = named[0] if named else None
        return self._guard(given or self._policies.get(rail))

    def check(self, config: RailsConfig) -> None:
        """Finds now what would fail, or judge nothing, at the first request.

        Raises:
            SettingsError: A flow of ours stands where it can't work or isn't one, a rail has no category to judge by,
                or several of its flows can't be told apart.
            PolicyError: A policy can't be found or read.
        """
        if config.colang_version == "1.0" and not _runs_ours(config):
            log.warning(
                "Nothing is judged: no flow under rails.input, output, retrieval, tool_output or tool_input is one of "
                "ours (%s), and none of the app's own calls one.",
                ", ".join(_OURS),
            )
        _check_streams(config)
        data = config.custom_data or {}
        if "rsafe" not in data and (misplaced := sorted({*data} & {*GuardSettings.model_fields})):
            log.warning(
                "custom_data has %s, which the guard reads under custom_data.rsafe alone.",
                ", ".join(misplaced),
            )
        for rail in RAILS:
            for flow in _flows(config, rail):
                _check_place(name_of(flow), rail)
                if (
                    config.colang_version != "1.0"
                    and rail not in _READ_IN_COLANG_2
                    and name_of(flow) in _OURS
                ):
                    raise SettingsError(
                        f"NeMo runs no flows of rails.{_SECTIONS[rail]} in Colang 2: await '{name_of(flow)}' in a flow "
                        "of the app, as docs/nemo.md shows, and take it out there."
                    )
            named = policies_in(config, rail)
            if len(named) > 1 and (None in named or len(set(named)) < len(named)):
                raise SettingsError(
                    f"Several flows '{flow_of(rail)}' must each name a policy of its own, as in "
                    f"'{flow_of(rail)} $policy=mlcommons', and they name {named}."
                )
            # In Colang 2, which names its flows in code, the settings say which rails there are.
            for name in named or [None] * (rail in self._policies):
                self._check_policy(rail, name)
        for rail, name in _called(config):
            self._check_policy(rail, name)

    def _check_policy(self, rail: Rail, name: str | None) -> None:
        policy = self._guard(name or self._policies.get(rail)).policy
        try:
            policy.for_kind(_KINDS[rail])
        except PolicyError as error:
            raise SettingsError(
                f"The flow '{flow_of(rail)}' needs a policy with a category that applies to "
                f"{_KINDS[rail]}, and {policy.name!r} has none: set custom_data.rsafe.policies.{rail}."
            ) from error

    def _guard(self, policy: Policy | str | Path | None) -> Guard:
        if policy is None:
            return self.default
        key = policy.digest if isinstance(policy, Policy) else str(policy)
        if key not in self._guards:
            found = policy if isinstance(policy, Policy) else self._find(policy)
            settings = self.default.settings.model_copy(update={"policy": found})
            self._guards[key] = Guard.from_settings(settings)
        return self._guards[key]


def _called(config: RailsConfig) -> Iterator[tuple[Rail, str]]:
    """Our flows that the app's code gives a policy by its name or path, in Colang 2.

    Raises:
        SettingsError: One is given a text in its place.
    """
    flows = config.flows if config.colang_version != "1.0" else []
    replaced = {flow.name for flow in flows if any(one.name == "override" for one in flow.decorators)}
    for call in _specs([flow.elements for flow in flows]):
        rail = _OURS.get(str(call.name)) if call.name not in replaced else None
        if rail is None:
            continue
        place = "$1" if rail in ("tool_call", "tool_result") else "$0"
        given = call.arguments.get("policy", call.arguments.get(place))
        if given in _TEXTS:
            raise SettingsError(
                f"The flow '{call.name}' takes a policy, as in '{call.name} $policy=\"mlcommons\"', not {given}: it "
                "finds the text itself."
            )
        if literal := _LITERAL.fullmatch(str(given)):
            yield rail, literal["text"]


def _specs(parsed: object) -> Iterator[Spec]:
    """What the code names, wherever it stands in what NeMo parsed."""
    if isinstance(parsed, Spec):
        yield parsed
    elif isinstance(parsed, Element):
        yield from _specs(vars(parsed))
    elif isinstance(parsed, Mapping):
        yield from _specs([*parsed.values()])
    elif isinstance(parsed, list):
        for one in parsed:
            yield from _specs(one)


def _runs_ours(config: RailsConfig) -> bool:
    """Whether a rail is one of our flows, or a flow of the app calls one or its action."""
    if any(name_of(flow) in _OURS for rail in RAILS for flow in _flows(config, rail)):
        return True
    own = [flow for flow in config.flows or [] if not _OF_LIBRARY.match(str(flow.get("id", "")))]
    return bool(re.search(r"rsafe[ _]check", str(own)))


def _check_streams(config: RailsConfig) -> None:
    """Refuses an output flow whose action NeMo doesn't find: of a stream it would run no rail, or break at the first.

    Rails that run in parallel are then left out without a word, ours too.
    """
    if config.colang_version != "1.0" or not config.rails.output.streaming.enabled or not _runs_ours(config):
        return
    for flow in _flows(config, "output"):
        try:
            get_action_details_from_flow_id(flow, config.flows)
        except Exception as error:
            raise SettingsError(
                f"NeMo can't judge a stream by the output flow {flow!r}, since it looks for the flow's own `execute`, "
                f"and finds none: put '{flow_of('output')}' itself under rails.output.flows, or turn "
                "rails.output.streaming off."
            ) from error


def _check_place(name: str, rail: Rail) -> None:
    """Refuses a flow of ours that NeMo would run where there is nothing for it to judge, or that isn't there."""
    own = _OURS.get(name)
    if own == rail or (own is None and not name.startswith("rsafe check")):
        return
    here = f"rails.{_SECTIONS[rail]}.flows has {name!r}"
    if own is None:
        raise SettingsError(f"{here}, which is none of our flows: {', '.join(_OURS)}.")
    raise SettingsError(f"{here}, which belongs under rails.{_SECTIONS[own]}.flows.")
