"""A chat engine behind the guard."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.chat_engine.types import (
    AGENT_CHAT_RESPONSE_TYPE,
    AgentChatResponse,
    BaseChatEngine,
    StreamingAgentChatResponse,
)
from llama_index.core.llms import ChatMessage, ChatResponse, MessageRole
from llama_index.core.schema import NodeWithScore

from rsafe_plugins.guard import Content, Guard, GuardSettings
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Part
from rsafe_plugins.guard.violation import REFUSAL
from rsafe_plugins.llama_index.judging import (
    EngineExitBehavior,
    Judge,
    OnViolation,
    Violation,
    asked_of_nodes,
    part,
    turns_of,
)


class RSafeChatEngine(BaseChatEngine):
    """A chat engine whose messages, nodes and answers are judged, each in the conversation it stands in.

    An unsafe message doesn't reach the engine. The nodes that were used and the answer are judged as one engine
    batch; where one is unsafe, the refusal takes the answer's place, in the conversation that the engine remembers as
    well. By then the model has seen the nodes: an `RSafeNodePostprocessor` in the engine keeps them from it.

    A streamed answer is held until all of it is judged, or, with `stream_window`, until all that it said so far is.

    Args:
        chat_engine: Any chat engine.
        guard: A `Guard`, or the settings to make one; None for `Guard()`.
        check_message: Judge the user's message.
        check_nodes: Judge the nodes that were used.
        check_response: Judge the answer.
        exit_behavior: `replace` (the default) answers with the refusal; `error` raises `RSafeViolationError`.
        violation_message: The refusal's text.
        on_violation: Called with what was judged and the verdict, for each violation.
        stream_window: Characters of a streamed answer after which all that was said so far is judged and handed
            on. Each window costs a check; what a later one blocks, the reader has partly seen. None holds it all.

    Raises:
        SettingsError: A setting can't be used.
        PolicyError: The policy can't be found or read.
        TemplateError: The template can't be found or read.
    """

    def __init__(
        self,
        chat_engine: BaseChatEngine,
        guard: Guard | GuardSettings | Mapping[str, Any] | None = None,
        *,
        check_message: bool = True,
        check_nodes: bool = True,
        check_response: bool = True,
        exit_behavior: EngineExitBehavior = "replace",
        violation_message: str = REFUSAL,
        on_violation: OnViolation | None = None,
        stream_window: int | None = None,
    ) -> None:
        self.chat_engine = chat_engine
        self.check_message, self.check_nodes, self.check_response = check_message, check_nodes, check_response
        self._judge = Judge(
            guard,
            exit_behavior=exit_behavior,
            violation_message=violation_message,
            on_violation=on_violation,
            stream_window=stream_window,
        )
        # The conversation that the engine is given with the next message, instead of the one it remembers.
        self._instead: list[ChatMessage] | None = None
        # A stream that nobody has read to its end; the engine remembers its answer when it ends.
        self._unread: StreamingAgentChatResponse | None = None

    @property
    def guard(self) -> Guard:
        """The guard that judges."""
        return self._judge.guard

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far, with refusals in the place of what was blocked."""
        return list(self.chat_engine.chat_history if self._instead is None else self._instead)

    def reset(self) -> None:
        """Forgets the conversation."""
        _drain(self._unread)
        self._instead = self._unread = None
        self.chat_engine.reset()

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AGENT_CHAT_RESPONSE_TYPE:
        """Answers a message.

        Raises:
            RSafeViolationError: Something was blocked and `exit_behavior` is `error`.
            RSafeError: A check failed and the guard's `on_error` is `raise`.
        """
        _drain(self._unread)
        turn = self._begin(message, chat_history)
        if violation := self._judge.check(turn.asked):
            return self._refused(turn, violation)
        with turn:
            response = self.chat_engine.chat(message, turn.given)
        violation = self._judge.check(self._asked_of_answer(turn, response, str(response)))
        return self._refused(turn, violation) if violation else self._passed(response)

    async def achat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AGENT_CHAT_RESPONSE_TYPE:
        """Like `chat`, without blocking the event loop."""
        await _adrain(self._unread)
        turn = self._begin(message, chat_history)
        if violation := await self._judge.acheck(turn.asked):
            return self._refused(turn, violation)
        with turn:
            response = await self.chat_engine.achat(message, turn.given)
        violation = await self._judge.acheck(self._asked_of_answer(turn, response, str(response)))
        return self._refused(turn, violation) if violation else self._passed(response)

    def stream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like `chat`, with the answer as a stream."""
        _drain(self._unread)
        turn = self._begin(message, chat_history)
        if violation := self._judge.check(turn.asked):
            return _streaming(iter([self._refused(turn, violation).response]))
        with turn:
            response = self._unread = self.chat_engine.stream_chat(message, turn.given)
        if violation := self._judge.check(self._asked_of_answer(turn, response)):
            _drain(response)
            return _streaming(iter([self._refused(turn, violation).response]))
        return _streaming(self._gated(turn, response), response.source_nodes)

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like `stream_chat`, without blocking the event loop."""
        await _adrain(self._unread)
        turn = self._begin(message, chat_history)
        if violation := await self._judge.acheck(turn.asked):
            return _astreaming(_aonly(self._refused(turn, violation).response))
        with turn:
            response = self._unread = await self.chat_engine.astream_chat(message, turn.given)
        if violation := await self._judge.acheck(self._asked_of_answer(turn, response)):
            await _adrain(response)
            return _astreaming(_aonly(self._refused(turn, violation).response))
        return _astreaming(self._agated(turn, response), response.source_nodes)

    def _gated(self, turn: _Turn, response: StreamingAgentChatResponse) -> Iterator[str]:
        gate = self._judge.gate(lambda text: self._answer(turn, text))
        yield from gate.passed(response.response_gen) if self.check_response else response.response_gen
        _drain(response)
        self._end(turn, gate.violation)

    async def _agated(self, turn: _Turn, response: StreamingAgentChatResponse) -> AsyncIterator[str]:
        gate = self._judge.gate(lambda text: self._answer(turn, text))
        chunks = response.async_response_gen()
        async for chunk in gate.apassed(chunks) if self.check_response else chunks:
            yield chunk
        await _adrain(response)
        self._end(turn, gate.violation)

    def _end(self, turn: _Turn, violation: Violation | None) -> None:
        if violation:
            self._refused(turn, violation)
        else:
            self._instead = None

    def _begin(self, message: str, chat_history: list[ChatMessage] | None) -> _Turn:
        self._unread = None
        before = self.chat_history if chat_history is None else list(chat_history)
        given = chat_history if chat_history is not None else self._instead
        history = turns_of(before)
        asked = [part(Content("prompt", message, history=history))] if self.check_message else []
        return _Turn(self, message, before, given, history, asked)

    def _asked_of_answer(
        self, turn: _Turn, response: AGENT_CHAT_RESPONSE_TYPE, text: str | None = None
    ) -> list[Part]:
        asked = asked_of_nodes(response.source_nodes, turn.message) if self.check_nodes else []
        return [*asked, self._answer(turn, text)] if self.check_response and text is not None else asked

    def _answer(self, turn: _Turn, text: str) -> Part:
        return part(Content("response", text, turn.message, turn.history))

    def _passed(self, response: AGENT_CHAT_RESPONSE_TYPE) -> AGENT_CHAT_RESPONSE_TYPE:
        self._instead = None
        return response

    def _refused(self, turn: _Turn, violation: Violation) -> AgentChatResponse:
        """Answers with the refusal; an engine that has heard the message forgets what it has said to it."""
        text = self._judge.violation_message
        if violation.stage != "prompt":
            self.chat_engine.reset()
            self._instead = [*turn.before, turn.said, ChatMessage(text, role=MessageRole.ASSISTANT)]
        return AgentChatResponse(response=text, metadata=violation.mark)


@dataclass
class _Turn:
    """A message and the conversation before it.

    Around the engine's own work it sees to it that an answer which is never judged is remembered by nobody.
    """

    engine: RSafeChatEngine
    message: str
    before: list[ChatMessage]
    given: list[ChatMessage] | None
    history: tuple[Turn, ...]
    asked: list[Part]

    @property
    def said(self) -> ChatMessage:
        return ChatMessage(self.message, role=MessageRole.USER)

    def __enter__(self) -> None:
        self.engine._instead = self.before

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.engine._instead = [*self.before, self.said]


def _streaming(chunks: Iterator[str], nodes: Sequence[NodeWithScore] = ()) -> StreamingAgentChatResponse:
    said = (_chunk(chunk) for chunk in chunks)
    return StreamingAgentChatResponse(chat_stream=said, source_nodes=list(nodes), is_writing_to_memory=False)


def _astreaming(
    chunks: AsyncIterator[str], nodes: Sequence[NodeWithScore] = ()
) -> StreamingAgentChatResponse:
    said = (_chunk(chunk) async for chunk in chunks)
    return StreamingAgentChatResponse(achat_stream=said, source_nodes=list(nodes), is_writing_to_memory=False)


def _chunk(text: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(text, role=MessageRole.ASSISTANT), delta=text)


async def _aonly(text: str) -> AsyncIterator[str]:
    yield text


def _drain(response: StreamingAgentChatResponse | None) -> None:
    """Lets a stream come to its end: the engine remembers the answer then, from a thread of its own."""
    if response is None:
        return
    with contextlib.suppress(Exception):
        for _ in response.response_gen:
            pass


async def _adrain(response: StreamingAgentChatResponse | None) -> None:
    if response is None:
        return
    with contextlib.suppress(Exception):
        async for _ in response.async_response_gen():
            pass
