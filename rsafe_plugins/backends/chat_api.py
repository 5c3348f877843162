"""OpenAI's chat API as data: what is sent, and what is read from an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from rsafe_plugins.backends.base import Request, Usage
from rsafe_plugins.backends.spelling import log_sum
from rsafe_plugins.errors import BackendError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skills:
    """How to ask a server, and what it can do then.

    Attributes:
        continues: It continues a begun assistant message.
        flags: It has to be told to.
        repeats: Its answer begins with that message.
        top: How many of the likeliest tokens it tells; 0 for none.
        limit: What it calls the budget of new tokens.
        greedy: It lets the temperature be chosen.
    """

    continues: bool = False
    flags: bool = False
    repeats: bool = False
    top: int = 0
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    greedy: bool = True


_CLOSED = re.compile(r"<\s*/\s*think", re.IGNORECASE)


class _Unshown(str):
    """Text that is sent but not shown: with debug logging on, versions of the SDK below 3 log what they send."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} characters>"


class _Token(BaseModel):
    token: str
    logprob: Annotated[float, Field(allow_inf_nan=False)]
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None


class _Position(BaseModel):
    token: str = ""
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Reply(BaseModel):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(BaseModel):
    """One answer of those that a request may have."""

    index: int = 0
    message: _Reply
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(BaseModel):
    cached_tokens: int | None = None


class _Counts(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class Answer(BaseModel):
    """What a chat request gets."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: _Counts | None = None

    @field_validator("choices")
    @classmethod
    def _only_one(cls, choices: list[Choice]) -> list[Choice]:
        """One answer is asked for. Of several, in whatever order they come, the first one counts."""
        first = choices if len(choices) == 1 else [choice for choice in choices if choice.index == 0]
        if len(first) != 1:
            raise ValueError("more than one answer")
        return first


class _Piece(BaseModel):
    index: int = 0
    delta: _Reply = _Reply()
    finish_reason: str | None = None


class _Chunk(BaseModel):
    choices: list[_Piece] = []
    usage: _Counts | None = None


@dataclass(slots=True)
class Stream:
    """An answer that comes in pieces, as server-sent events.

    Attributes:
        answer: What has come of it so far.
        pieces: How many pieces of text; most servers send one a token.
    """

    answer: Answer = field(default_factory=lambda: Answer(choices=[Choice(message=_Reply())]))
    pieces: int = 0

    def read(self, line: str) -> bool:
        """Takes one line of the stream; returns whether it brought text.

        Raises:
            ValidationError: It is no event of the chat API.
        """
        kind, _, data = line.partition(":")
        if kind != "data" or data.strip() == "[DONE]":
            return False
        chunk = _Chunk.model_validate_json(data)
        self.answer.usage = chunk.usage or self.answer.usage
        choice, length = self.answer.choices[0], self.pieces
        # Only one answer was asked for; pieces of another one must not mix with it.
        for piece in (one for one in chunk.choices if one.index == 0):
            choice.finish_reason = piece.finish_reason or choice.finish_reason
            for name in ("content", "reasoning", "reasoning_content"):
                if text := getattr(piece.delta, name):
                    setattr(choice.message, name, (getattr(choice.message, name) or "") + text)
                    self.pieces = length + 1
        return self.pieces > length

    def leave(self) -> None:
        """Ends the answer where it is: it holds enough, and nobody will tell how many tokens it took."""
        choice = self.answer.choices[0]
        choice.finish_reason = choice.finish_reason or "stop"
        self.answer.usage = self.answer.usage or _Counts(completion_tokens=self.pieces)


class _Model(BaseModel):
    id: str


class Models(BaseModel):
    """What the list of models gets."""

    data: list[_Model]


def chat_body(request: Request, skills: Skills, top: int = 0) -> dict[str, Any]:
    """The chat request for text; with `top`, also for the likeliest tokens at each place."""
    messages = [{"role": message.role, "content": _Unshown(message.content)} for message in request.messages]
    body: dict[str, Any] = {"messages": messages, skills.limit: request.max_tokens}
    if skills.greedy:
        body["temperature"] = 0.0
        # Models that don't let the temperature be chosen know no stop strings either.
        if request.stop:
            body["stop"] = list(request.stop)
    if request.prefill:
        messages.append({"role": "assistant", "content": _Unshown(request.prefill)})
        if skills.flags:
            body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
    if top:
        body |= {"logprobs": True, "top_logprobs": top}
    return body


def scoring_body(request: Request, prefill: str, skills: Skills) -> dict[str, Any]:
    """The chat request for the likeliest next tokens; which of them is drawn doesn't matter."""
    asked = replace(request, prefill=prefill, max_tokens=1, stop=(), candidates=())
    # Some servers report probabilities as the temperature makes them: 1 leaves the model's own.
    return chat_body(asked, skills, skills.top) | {"temperature": 1.0}


def generated(choice: Choice, prefill: str, *, repeats: bool) -> str | None:
    """What the model generated after the prefill; None where the answer doesn't hold it.

    Raises:
        BackendError: Where its thought ends can't be told.
    """
    content, thought = choice.message.content, choice.message.reasoning_content or choice.message.reasoning
    if thought:
        if _CLOSED.search(thought):
            # What follows in it would be read as the answer.
            raise BackendError(
                "The server took out a thought that closes itself, so that its answer can't be told from it: serve the "
                "model without a reasoning parser."
            )
        # A server with a reasoning parser takes the thought out of the answer. The guard reads answers strictly
        # and must see all that was generated, so it is put back; closed only where an answer follows, since a
        # thought that ran into its budget never was.
        text = f"<think>{thought}</think>{content}" if content else f"<think>{thought}"
        if prefill and not repeats:
            text = text.removeprefix("<think>")
    elif content is None:
        return None
    else:
        text = content
    return _after(prefill, text) if prefill and repeats else text


def _after(prefix: str, text: str) -> str | None:
    """The rest of a text that begins with the prefix, whitespace aside, which reasoning parsers trim."""
    places: Iterator[int] = (at for at, character in enumerate(text) if not character.isspace())
    end = 0
    for expected in "".join(prefix.split()):
        at = next(places, None)
        if at is None or text[at] != expected:
            return None
        end = at + 1
    return text[end:]


def drawn(answer: Answer) -> list[bytes]:
    """The tokens of an answer."""
    logprobs = answer.choices[0].logprobs
    return [_raw(position) for position in (logprobs and logprobs.content) or ()]


def likeliest(answer: Answer) -> list[dict[bytes, float]]:
    """At each place of an answer the likeliest tokens with their log-probabilities; those of the same text as one."""
    logprobs = answer.choices[0].logprobs
    places = []
    for position in (logprobs and logprobs.content) or ():
        pieces: dict[bytes, float] = {}
        for token in position.top_logprobs:
            piece = _raw(token)
            pieces[piece] = min(log_sum([token.logprob, pieces.get(piece, -math.inf)]), 0.0)
        places.append(pieces)
    return places


def _raw(token: _Token | _Position) -> bytes:
    return bytes(token.bytes) if token.bytes is not None else token.token.encode()


def usage_of(answer: Answer) -> Usage:
    """The tokens that an answer took, as far as the server tells."""
    counts = answer.usage or _Counts()
    details = counts.prompt_tokens_details or _PromptDetails()
    return Usage(counts.prompt_tokens or 0, details.cached_tokens or 0, counts.completion_tokens or 0)
