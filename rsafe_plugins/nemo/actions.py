"""What the rails execute: a message in, NeMo's `RailOutcome` out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from nemoguardrails import RailsConfig
from nemoguardrails.actions import action
from nemoguardrails.actions.rail_outcome import RailOutcome

from rsafe_plugins.guard import Guard, Verdict
from rsafe_plugins.guard.texts import Said, acheck_many, parts, text_of, worst
from rsafe_plugins.policy import Policy

log = logging.getLogger(__name__)

INPUT_FLOW = "rsafe check input"


class RailActions:
    """The actions of the rails, with one guard behind all of them.

    They are system actions: NeMo pastes what other actions return into the main model's prompt. An exception
    that leaves them becomes NeMo's own "internal error" and blocks.

    Args:
        guard: Judges what the rails hand over.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_input(
        self,
        text: object,
        events: Sequence[Mapping[str, Any]] = (),
        config: RailsConfig | None = None,
        **_: Any,
    ) -> RailOutcome:
        """Judges what the user wrote since the model's last turn, in the conversation it stands in.

        Args:
            text: The message: a string, or a list of content parts. One that isn't all text is a failed check.
            events: NeMo's events so far.
            config: The rail config.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        return await self._judge([*_said(events, config), Said("prompt", text_of(text))])

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_output(
        self,
        text: object,
        prompt: object,
        events: Sequence[Mapping[str, Any]] | None = None,
        config: RailsConfig | None = None,
        context: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> RailOutcome:
        """Judges what the model answered, and what the user wrote where NeMo has run no input rail on it.

        Args:
            text: The answer, or the part of it that is about to be streamed.
            prompt: What it answers; it counts where there are no events.
            events: NeMo's events so far; None while an answer streams.
            config: The rail config.
            context: NeMo's variables.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        answer = Said("response", text_of(text))
        if events is None:
            return await self._judge([Said("prompt", text_of(prompt)), answer], only_last=True)
        seen = not _input_rail_is_on(config, context) or _last_prompt_has_passed(events)
        return await self._judge([*_said(events, config), answer], only_last=seen)

    async def _judge(self, conversation: Sequence[Said], *, only_last: bool = False) -> RailOutcome:
        # NeMo has some messages in two events.
        asked = parts([said for said, _ in groupby(conversation)], self.guard.policy)
        if only_last:
            asked = [part for part in asked if part.messages == asked[-1].messages]
        verdicts = await acheck_many(self.guard, [part.content for part in asked])
        decides = worst(verdicts)
        if (error := verdicts[decides].error) is not None:
            # The outcome can be read by the client, who has no business with what broke.
            log.warning("No verdict on a %s: %s", asked[decides].kind, error)
        return rail_outcome(verdicts[decides], self.guard.policy)


def _said(events: Sequence[Mapping[str, Any]], config: RailsConfig | None) -> list[Said]:
    """What the main model gets to see of the conversation."""
    keys = {"UserMessage": "text"}
    if config is not None and config.passthrough:
        # The model is then shown what a rail has blocked in an earlier turn, too.
        keys["UtteranceUserActionFinished"] = "final_transcript"
    said = []
    for event in events:
        if key := keys.get(event["type"]):
            said.append(Said("prompt", text_of(event[key])))
        elif event["type"] == "StartUtteranceBotAction":
            said.append(Said("response", text_of(event["script"])))
    return said


def _input_rail_is_on(config: RailsConfig | None, context: Mapping[str, Any] | None) -> bool:
    options = (context or {}).get("generation_options") or {}
    flows = config.rails.input.flows if config is not None else []
    return INPUT_FLOW in flows and bool(options.get("rails", {}).get("input", True))


def _last_prompt_has_passed(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the input rail let the user's last message pass.

    NeMo runs no input rail where the client's messages don't end with the user's. A client can send events too,
    but no `RailOutcome`.
    """
    passed = last = False
    for event in _flat(events):
        match event["type"]:
            case "UtteranceUserActionFinished":
                passed = False
            case "InternalSystemActionFinished" if event.get("action_name") == "rsafe_check_input":
                outcome = event.get("return_value")
                passed = isinstance(outcome, RailOutcome) and not outcome.is_blocked
            case "UserMessage":
                passed, last = False, passed
    return last


def _flat(events: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The events with those of rails that ran in parallel in their place."""
    for event in events:
        yield from event["data"]["events"] if event["type"] == "EventHistoryUpdate" else (event,)


def rail_outcome(verdict: Verdict, policy: Policy) -> RailOutcome:
    """A verdict in NeMo's words. Clients may read it, so neither content nor reasoning is in it.

    Args:
        verdict: The guard's verdict.
        policy: The policy it was made under, for the categories' names.
    """
    names = {category.id: category.name for category in policy.categories}
    metadata = {
        "label": verdict.label,
        "categories": [{"id": identifier, "name": names[identifier]} for identifier in verdict.categories],
        "score": verdict.score,
        "model": verdict.model,
        "policy": verdict.policy,
    }
    if verdict.label is None:
        outcome = RailOutcome.failure if verdict.blocked else RailOutcome.allow
        return outcome(reason="The guard gave no verdict.", metadata=metadata)
    named = ", ".join(f"{identifier} {names[identifier]}" for identifier in verdict.categories)
    outcome = RailOutcome.block if verdict.blocked else RailOutcome.allow
    return outcome(reason=f"{verdict.label}: {named}" if named else verdict.label, metadata=metadata)
