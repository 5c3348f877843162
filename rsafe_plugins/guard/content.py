"""What is judged: one prompt, response, document, tool call or tool result, with what surrounds it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rsafe_plugins.policy import ContentKind

Speaker = Literal["user", "agent"]

_SPEAKERS: Mapping[str, Speaker] = {
    "user": "user",
    "human": "user",
    "agent": "agent",
    "assistant": "agent",
    "ai": "agent",
    "bot": "agent",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier turn of the conversation."""

    speaker: Speaker
    text: str

    def __post_init__(self) -> None:
        _check_text(self.text)


History = Iterable[Turn | tuple[str, str] | Mapping[str, str]]
"""Earlier turns, oldest first: `Turn`, `(role, text)` or `{"role": ..., "content": ...}`; roles as users
write them (user, human; agent, assistant, ai, bot)."""


@dataclass(frozen=True, slots=True)
class Content:
    """One piece of content under judgement. Made by the constructor of its kind.

    Attributes:
        kind: What it is.
        text: The text that is judged.
        context: What it answers or was brought for: the prompt of a response, the query of a document, the
            name of a tool.
        history: Earlier turns of the conversation, oldest first.
    """

    kind: ContentKind
    text: str
    context: str = ""
    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        for value in (self.text, self.context):
            _check_text(value)

    @classmethod
    def prompt(cls, text: str, history: History = ()) -> Content:
        """What a user asks, after the earlier turns of `history`."""
        return cls("prompt", text, history=_turns(history))

    @classmethod
    def response(cls, text: str, prompt: str = "", history: History = ()) -> Content:
        """What the model answered to `prompt`, after the earlier turns of `history`."""
        return cls("response", text, prompt, _turns(history))

    @classmethod
    def document(cls, text: str, query: str = "") -> Content:
        """What a retriever brought for `query`."""
        return cls("document", text, query)

    @classmethod
    def tool_call(cls, name: str, arguments: str | Mapping[str, Any]) -> Content:
        """What an agent is about to do: the tool's name and its arguments, as text or as a mapping."""
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False, default=str)
        return cls("tool_call", arguments, name)

    @classmethod
    def tool_result(cls, text: str, name: str = "", history: History = ()) -> Content:
        """What the tool called `name` brought back, after the earlier turns of `history`."""
        return cls("tool_result", text, name, _turns(history))

    @property
    def size(self) -> int:
        """Characters of the text and of all that surrounds it."""
        return len(self.text) + len(self.context) + sum(len(turn.text) for turn in self.history)


def _check_text(value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"Content takes text as str, not {type(value).__name__}.")


def _turns(history: History) -> tuple[Turn, ...]:
    return tuple(_turn(item) for item in history)


def _turn(item: Turn | tuple[str, str] | Mapping[str, str]) -> Turn:
    if isinstance(item, Turn):
        return item
    role, text = (item["role"], item["content"] or "") if isinstance(item, Mapping) else item
    speaker = _SPEAKERS.get(role.lower())
    if speaker is None:
        raise ValueError(f"A turn's role must be one of {', '.join(_SPEAKERS)}, not {role!r}.")
    return Turn(speaker, text)
