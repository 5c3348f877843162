"""A chat engine behind the guard."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
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

from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard import Content, Guard, GuardSettings
from rsafe_plugins.guard.content import Turn
from rsafe_plugins.guard.texts import Part, Said, Text, parts
from rsafe_plugins.guard.violation import REFUSAL, OnViolation
from rsafe_plugins.llama_index.judging import (
    EngineExitBehavior,
    Judge,
    Violation,
    aonly,
    asked_of_nodes,
    part,
    said_of,
    turns_of,
)

_SHORT = 1.0
"""Seconds for another thread's event loop to cancel a task. One that takes longer is blocked, and the task with it."""

log = logging.getLogger(__name__)


class RSafeChatEngine(BaseChatEngine):
    """A chat engine whose messages, nodes and answers are judged, each in the conversation it stands in.

    An unsafe message doesn't reach the engine. The nodes that were used and the answer are judged as one engine
    batch; where one is unsafe, the refusal takes the answer's place, in the conversation that is remembered as well.
    By then the model has seen the nodes: an `RSafeNodePostprocessor` in the engine keeps them from it.

    A streamed answer is held until all of it is judged, or, with `stream_window`, until all that it said so far is.

    The conversation is kept here and given to the engine with each message; what the engine remembers by itself is
    emptied before. Of a blocked message, of a turn that fails, and of a stream that isn't read to its end before the
    next message reaches the engine, nothing is remembered. Turns wait for each other; a stream that is being read
    holds up the next one until the model has said all. A stream of `astream_chat` ends with a `RuntimeError` where
    code that can't wait for its event loop goes on with the conversation: `chat`, `stream_chat`, `reset`.

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
        if not hasattr(chat_engine, "astream_chat"):
            raise SettingsError(
                f"RSafeChatEngine takes a chat engine, not {type(chat_engine).__name__}: give what an index's "
                "as_chat_engine() makes."
            )
        self._judge = Judge(
            guard,
            exit_behavior=exit_behavior,
            violation_message=violation_message,
            on_violation=on_violation,
            stream_window=stream_window,
        )
        self._judge.need(
            check_message="prompt" if check_message else None,
            check_nodes="document" if check_nodes else None,
            check_response="response" if check_response else None,
        )
        # What was said and judged, None until it is read from the engine; a list is replaced, never changed.
        self._record: list[ChatMessage] | None = None
        # The turn whose answer may be remembered, and what guards it together with the record.
        self._latest: object = None
        self._mutex = threading.Lock()
        # Done when the last turn in the queue is; what may still write to the engine's memory after its turn.
        self._last: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._last.set_result(None)
        self._writers: list[_Writer] = []

    @property
    def guard(self) -> Guard:
        """The guard that judges."""
        return self._judge.guard

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far, with refusals in the place of what was blocked."""
        record = self._record
        return _copied(self.chat_engine.chat_history if record is None else record)

    def reset(self) -> None:
        """Forgets the conversation, and the answers that are under way."""
        with self._mutex:
            self._latest, self._record = object(), []
        self._clear_between_turns(self._latest)

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AGENT_CHAT_RESPONSE_TYPE:
        """Answers a message.

        Args:
            message: What the user says.
            chat_history: The conversation before it, in the place of the one that is remembered. Of it the user's
                messages right before this one are judged, too; the rest is context, which must be trusted.

        Raises:
            RSafeViolationError: Something was blocked and `exit_behavior` is `error`.
            RSafeError: A check failed and the guard's `on_error` is `raise`.
            RuntimeError: Another turn is under way, and this is called on an event loop that can't wait for it.
        """
        with self._alone():
            turn = self._begin(message, chat_history)
            if violation := self._judge.check(turn.asked):
                return self._refusal(violation)
            with self._heard(turn):
                response = self.chat_engine.chat(message, _copied(turn.before))
                violation = self._judge.check(self._asked_of_answer(turn, response, str(response)))
                if not self._remember(turn, str(response), violation):
                    self._clear()
            return self._refusal(violation) if violation else response

    async def achat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> AGENT_CHAT_RESPONSE_TYPE:
        """Like `chat`, without blocking the event loop."""
        async with self._aalone():
            turn = await asyncio.to_thread(self._begin, message, chat_history)
            if violation := await self._judge.acheck(turn.asked):
                return self._refusal(violation)
            async with self._aheard(turn):
                response = await self.chat_engine.achat(message, _copied(turn.before))
                violation = await self._judge.acheck(self._asked_of_answer(turn, response, str(response)))
                if not self._remember(turn, str(response), violation):
                    await self._aclear()
            return self._refusal(violation) if violation else response

    def stream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like `chat`, with the answer as a stream."""
        with self._alone():
            turn = self._begin(message, chat_history)
            if violation := self._judge.check(turn.asked):
                return _streaming(iter([self._judge.violation_message]))
            with self._heard(turn):
                response = self.chat_engine.stream_chat(message, _copied(turn.before))
                self._writers.append(_Writer(response))
                if violation := self._judge.check(self._asked_of_answer(turn, response)):
                    self._remember(turn, "", violation)
                    self._clear()
                    return _streaming(iter([self._judge.violation_message]))
        return _streaming(self._gated(turn, response), _nodes_of(response))

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like `stream_chat`, without blocking the event loop."""
        async with self._aalone():
            turn = await asyncio.to_thread(self._begin, message, chat_history)
            if violation := await self._judge.acheck(turn.asked):
                return _astreaming(aonly(self._judge.violation_message))
            async with self._aheard(turn):
                response = await self.chat_engine.astream_chat(message, _copied(turn.before))
                self._writers.append(_Writer(response))
                if violation := await self._judge.acheck(self._asked_of_answer(turn, response)):
                    self._remember(turn, "", violation)
                    await self._aclear()
                    return _astreaming(aonly(self._judge.violation_message))
        return _astreaming(self._agated(turn, response), _nodes_of(response))

    def _gated(self, turn: _Turn, response: StreamingAgentChatResponse) -> Iterator[str]:
        gate = self._judge.gate(lambda text: self._answer(turn, text))
        said = []
        try:
            for chunk in gate.passed(response.response_gen) if self.check_response else response.response_gen:
                said.append(chunk)
                yield chunk
        except BaseException:
            # Whoever leaves waits for the model to end: what it writes must not stay for another engine to find.
            self._clear_between_turns(turn)
            raise
        if not self._remember(turn, "".join(said).strip(), gate.violation):
            self._clear_between_turns(turn)

    async def _agated(self, turn: _Turn, response: StreamingAgentChatResponse) -> AsyncIterator[str]:
        gate = self._judge.gate(lambda text: self._answer(turn, text))
        said, chunks = [], response.async_response_gen()
        try:
            async for chunk in gate.apassed(chunks) if self.check_response else chunks:
                said.append(chunk)
                yield chunk
        except BaseException:  # a cancelled reader, too
            await self._aclear_between_turns(turn)
            raise
        if not self._remember(turn, "".join(said).strip(), gate.violation):
            await self._aclear_between_turns(turn)

    def _begin(self, message: str, chat_history: list[ChatMessage] | None) -> _Turn:
        after = self._latest
        record = self.chat_history
        with self._mutex:
            if self._record is None:
                self._record = record
        before = record if chat_history is None else _copied(chat_history)
        history = turns_of(before)
        asked = [part(Content("prompt", message, history=history))]
        if chat_history is not None:
            asked = parts([*said_of(before), Said("prompt", Text(message))], self.guard.policy)
        return _Turn(message, before, history, asked if self.check_message else [], after)

    @contextlib.contextmanager
    def _heard(self, turn: _Turn) -> Iterator[None]:
        """Around what the engine does with a message: it remembers nothing before, and nothing where that fails."""
        self._clear()
        self._supersede(turn)
        try:
            yield
        except BaseException:
            with _keeping_the_first_error():
                self._clear()
            raise

    @contextlib.asynccontextmanager
    async def _aheard(self, turn: _Turn) -> AsyncIterator[None]:
        await self._aclear(stop=False)
        self._supersede(turn)
        try:
            yield
        except BaseException:
            with _keeping_the_first_error():
                await self._aclear()
            raise

    def _supersede(self, turn: _Turn) -> None:
        with self._mutex:
            # Otherwise the conversation that the turn belongs to was forgotten meanwhile.
            if self._latest is turn.after:
                self._latest = turn

    def _remember(self, turn: _Turn, answer: str, violation: Violation | None) -> bool:
        """Adds a turn to the conversation unless a later one began; says whether the engine may remember the same."""
        text = self._judge.violation_message if violation else answer
        said = ChatMessage(turn.message, role=MessageRole.USER), ChatMessage(text, role=MessageRole.ASSISTANT)
        with self._mutex:
            if is_latest := self._latest is turn:
                self._record = [*turn.before, *said]
        return is_latest and violation is None

    def _clear(self) -> None:
        """Empties the engine's memory, when nothing can write to it anymore."""
        for writer in self._writers:
            writer.settle()
        self._writers = [writer for writer in self._writers if not writer.is_done]
        self.chat_engine.reset()

    async def _aclear(self, *, stop: bool = True) -> None:
        for writer in self._writers:
            await writer.asettle(stop=stop)
        self._writers = [writer for writer in self._writers if not writer.is_done]
        await asyncio.to_thread(self.chat_engine.reset)

    def _clear_between_turns(self, latest: object) -> None:
        """Empties the engine's memory unless a later turn did."""
        if _running_loop() is None or self._last.done():
            with self._alone():
                if self._latest is latest:
                    self._clear()

    async def _aclear_between_turns(self, latest: object) -> None:
        async with self._aalone():
            if self._latest is latest:
                await self._aclear()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until the turns before are over; those that come later wait until this one is."""
        if _running_loop() is not None and not self._last.done():
            raise RuntimeError("Another turn of this chat engine is under way: use its async methods here.")
        before, own = self._queue()
        try:
            before.result()
            yield
        finally:
            # One that gives up waiting lets nobody pass those before it.
            before.add_done_callback(lambda _: own.set_result(None))

    @contextlib.asynccontextmanager
    async def _aalone(self) -> AsyncIterator[None]:
        before, own = self._queue()
        try:
            await asyncio.shield(asyncio.wrap_future(before))
            yield
        finally:
            before.add_done_callback(lambda _: own.set_result(None))

    def _queue(self) -> tuple[concurrent.futures.Future[None], concurrent.futures.Future[None]]:
        with self._mutex:
            before, self._last = self._last, concurrent.futures.Future()
            return before, self._last

    def _asked_of_answer(
        self, turn: _Turn, response: AGENT_CHAT_RESPONSE_TYPE, text: str | None = None
    ) -> list[Part]:
        asked = asked_of_nodes(_nodes_of(response), turn.message) if self.check_nodes else []
        return [*asked, self._answer(turn, text)] if self.check_response and text is not None else asked

    def _answer(self, turn: _Turn, text: str) -> Part:
        return part(Content("response", text, turn.message, turn.history))

    def _refusal(self, violation: Violation) -> AgentChatResponse:
        return AgentChatResponse(response=self._judge.violation_message, metadata=violation.mark)


@dataclass(frozen=True, eq=False)
class _Turn:
    """A message and the conversation before it; `after` is the latest turn when it began."""

    message: str
    before: list[ChatMessage]
    history: tuple[Turn, ...]
    asked: list[Part]
    after: object


class _Writer:
    """What writes a streamed answer to the engine's memory, read or not: a thread, or a task of an event loop."""

    def __init__(self, response: StreamingAgentChatResponse) -> None:
        self._response = response
        self._thread = response.write_response_to_history_thread
        self._task = response.awrite_response_to_history_task
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        if self._task is not None:
            self._task.add_done_callback(lambda _: self._ended.set_result(None))

    @property
    def is_done(self) -> bool:
        if self._task is not None:
            return self._task.done() or self._task.get_loop().is_closed()
        return self._thread is None or not self._thread.is_alive()

    def settle(self) -> None:
        """Waits for the thread; stops the task."""
        if self._thread is not None:
            self._thread.join()
        elif self._stop():
            concurrent.futures.wait([self._ended], _SHORT)

    async def asettle(self, *, stop: bool) -> None:
        """Like `settle`, but waits for a task of this event loop, too, unless nobody will read its stream."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        elif self._task is not None and self._task.get_loop() is _running_loop():
            if stop:
                self._stop()
            await asyncio.wait([self._task])
        elif self._stop():
            await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=_SHORT)

    def _stop(self) -> bool:
        """Stops the task; says whether another thread's event loop is about to."""
        if self._task is None or self.is_done:
            return False
        loop = self._task.get_loop()
        if loop is _running_loop():
            self._cancel(self._task)
            return False
        with contextlib.suppress(RuntimeError):  # It was closed just now.
            loop.call_soon_threadsafe(self._cancel, self._task)
        return loop.is_running()

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        # With all of it said, the task is writing, and LlamaIndex's memory loses its database where that is cancelled.
        if not self._response.response and not task.done():
            # Who still reads would wait for the task's end forever, or seem to be cancelled with it.
            self._response.exception = RuntimeError(
                "The conversation went on before this answer was complete."
            )
            self._response.awrite_response_to_history_task = None
            task.cancel()


@contextlib.contextmanager
def _keeping_the_first_error() -> Iterator[None]:
    """Around emptying a memory after something failed; the next turn empties it again, or fails."""
    try:
        yield
    except Exception as error:
        log.warning("The engine's memory couldn't be emptied: %s", type(error).__name__)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _copied(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    return [message.model_copy(deep=True) for message in messages]


def _nodes_of(response: AGENT_CHAT_RESPONSE_TYPE) -> list[NodeWithScore]:
    """The nodes that were used. LlamaIndex leaves out those of an answer that a query engine streams on a loop."""
    found = [node for source in response.sources for node in getattr(source.raw_output, "source_nodes", ())]
    return list({id(node): node for node in [*response.source_nodes, *found]}.values())


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
