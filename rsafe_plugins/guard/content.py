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
        object.__setattr__(self, "text", _plain(self.text))


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
        object.__setattr__(self, "text", _plain(self.text))
        object.__setattr__(self, "context", _plain(self.context))

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
        """What an agent is about to do: the tool's name and its arguments, as text or as a mapping.

        Raises:
            ValueError: The arguments are nested too deeply to be written down.
        """
        if not isinstance(arguments, str):
            try:
                arguments = _written(arguments)
            except RecursionError:
                raise ValueError("A tool's arguments must not be nested hundreds of levels deep.") from None
        return cls("tool_call", arguments, name)

    @classmethod
    def tool_result(cls, text: str, name: str = "", history: History = ()) -> Content:
        """What the tool called `name` brought back, after the earlier turns of `history`."""
        return cls("tool_result", text, name, _turns(history))

    @property
    def size(self) -> int:
        """Characters of the text and of all that surrounds it."""
        return len(self.text) + len(self.context) + sum(len(turn.text) for turn in self.history)


def _written(arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that JSON doesn't have, or a value that holds itself
        return repr(arguments)


def _plain(value: Any) -> str:
    """The text itself: what inherits from str may show something else of it."""
    if not isinstance(value, str):
        raise TypeError(f"Content takes text as str, not {type(value).__name__}.")
    return str.__str__(value)


def _turns(history: History) -> tuple[Turn, ...]:
    if isinstance(history, str | Mapping) or not isinstance(history, Iterable):
        raise TypeError(f"history takes a list of earlier turns, not {type(history).__name__}.")
    return tuple(_turn(item) for item in history)


def _turn(item: Turn | tuple[str, str] | Mapping[str, str]) -> Turn:
    match item:
        case Turn():
            return item
        case {"role": str(role), "content": text} | (str(role), text):
            pass
        case _:
            raise TypeError(
                'A turn of history is a Turn, (role, text) or {"role": ..., "content": ...}, '
                f"and this {type(item).__name__} is none."
            )
    speaker = _SPEAKERS.get(role.lower())
    if speaker is None:
        raise ValueError(f"A turn's role must be one of {', '.join(_SPEAKERS)}, not {role!r}.")
    return Turn(speaker, text or "")
