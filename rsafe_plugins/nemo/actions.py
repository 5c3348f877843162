"""What the rails execute: a message in, NeMo's `RailOutcome` out."""

from __future__ import annotations

import logging
from typing import Any

from nemoguardrails.actions import action
from nemoguardrails.actions.rail_outcome import RailOutcome

from rsafe_plugins.guard import Content, Guard, Verdict
from rsafe_plugins.policy import Policy

log = logging.getLogger(__name__)


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
    async def rsafe_check_input(self, text: object, **_: Any) -> RailOutcome:
        """Judges what the user wrote.

        Args:
            text: The message: a string, or a list of content parts. One that isn't all text is blocked.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        message = _text(text)
        if message is None:
            return _unreadable("user's message")
        return await self._judge(Content.prompt(message))

    @action(is_system_action=True)  # type: ignore[untyped-decorator]
    async def rsafe_check_output(self, text: object, prompt: object, **_: Any) -> RailOutcome:
        """Judges what the model answered to the user's message.

        Args:
            text: The answer, or the part of it that is about to be streamed.
            prompt: What it answers.

        Raises:
            RSafeError: The check failed and `on_error` is `raise`.
        """
        message = _text(text)
        if message is None:
            return _unreadable("model's answer")
        if prompt == "$user_message":
            # NeMo hands over a variable's name where it has no value: an answer is judged on its own.
            prompt = ""
        return await self._judge(Content.response(message, prompt=_text(prompt) or ""))

    async def _judge(self, content: Content) -> RailOutcome:
        verdict = await self.guard.acheck(content)
        if verdict.error is not None:
            # The outcome can be read by the client, who has no business with what broke.
            log.warning("No verdict on a %s: %s", content.kind, verdict.error)
        return rail_outcome(verdict, self.guard.policy)


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


def _unreadable(what: str) -> RailOutcome:
    return RailOutcome.failure(reason=f"The {what} is more than text, and the guard judges text only.")


def _text(message: object) -> str | None:
    """A message's text, or None if there is anything else in it."""
    if not isinstance(message, list):
        return message if isinstance(message, str) else None
    parts = [part.get("text") for part in message if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in parts if isinstance(text, str)]
    return "\n".join(texts) if len(texts) == len(message) else None
