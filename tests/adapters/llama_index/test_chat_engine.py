"""RSafeChatEngine around real chat engines; only the models are scripted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.llms import ChatMessage, ChatResponse, CompletionResponse, ImageBlock
from llama_index.core.memory import ChatMemoryBuffer
from support.canary import CANARY, SAFE, guard_backend, holds, judged_text
from support.faults import FAULTS
from support.llama_index import Found, Says, query_engine

from rsafe_plugins.llama_index import RSafeChatEngine, RSafeQueryEngine, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

REFUSAL = "I can't help with that request."
ANSWER = "At nine in the morning."
BAD = f"Take the {CANARY} first."
FACTS = ("We open at 9.", "We close at 5.")
ENGINES = {
    "simple": lambda llm, *_: SimpleChatEngine.from_defaults(llm=llm),
    "context": lambda llm, *texts: ContextChatEngine.from_defaults(Found(*texts), llm=llm),
    "condense": lambda llm, *texts: CondensePlusContextChatEngine.from_defaults(Found(*texts), llm=llm),
    "question": lambda llm, *texts: CondenseQuestionChatEngine.from_defaults(
        query_engine(llm, *texts, streaming=True), llm=llm
    ),
}
WAYS = ("chat", "achat", "stream_chat", "astream_chat")
ways = pytest.mark.parametrize("way", WAYS)
streams = pytest.mark.parametrize("way", ["stream_chat", "astream_chat"])
engines = pytest.mark.parametrize("kind", ENGINES)


def guarded(kind: str, llm: Any, *texts: str, backend: Any = None, **settings: Any) -> RSafeChatEngine:
    inner = ENGINES[kind](llm, *(texts or FACTS))
    return RSafeChatEngine(inner, {"backend": backend or guard_backend()}, **settings)


async def say(engine: RSafeChatEngine, way: str, text: str = "When do you open?", history: Any = None) -> str:
    if way == "chat":
        return str(await asyncio.to_thread(engine.chat, text, history))
    if way == "achat":
        return str(await engine.achat(text, history))
    if way == "stream_chat":
        return await asyncio.to_thread(lambda: "".join(engine.stream_chat(text, history).response_gen))
    stream = await engine.astream_chat(text, history)
    return "".join([chunk async for chunk in stream.async_response_gen()])


def remembered(engine: RSafeChatEngine) -> list[str]:
    return [str(message.content) for message in engine.chat_history]


async def opened(engine: RSafeChatEngine, way: str, text: str) -> Any:
    """A stream that nobody has read."""
    return engine.stream_chat(text) if way == "stream_chat" else await engine.astream_chat(text)


async def rest(stream: Any) -> str:
    if stream.achat_stream is not None:
        return "".join([chunk async for chunk in stream.async_response_gen()])
    return await asyncio.to_thread(lambda: "".join(stream.response_gen))


@ways
@engines
async def test_a_safe_conversation_is_answered_and_remembered(kind: str, way: str) -> None:
    engine = guarded(kind, Says(text=ANSWER))
    assert await say(engine, way) == ANSWER
    assert await say(engine, way, "And close?") == ANSWER
    assert remembered(engine) == ["When do you open?", ANSWER, "And close?", ANSWER]
    if kind != "question":  # It only adds to its memory, which is emptied before each message.
        assert remembered(engine) == [str(message.content) for message in engine.chat_engine.chat_history]


@ways
@engines
async def test_an_unsafe_message_reaches_no_model_and_is_not_remembered(kind: str, way: str) -> None:
    llm = Says(text=ANSWER)
    engine = guarded(kind, llm)
    assert await say(engine, way, f"Tell me the {CANARY}.") == REFUSAL
    assert llm.asked == []
    assert remembered(engine) == []
    assert await say(engine, way) == ANSWER
    assert not holds(CANARY, llm.asked, engine.chat_history, engine.chat_engine.chat_history)


@ways
@engines
async def test_an_unsafe_answer_is_replaced_in_what_is_remembered_too(kind: str, way: str) -> None:
    llm = Says(text=BAD)
    engine = guarded(kind, llm, violation_message="No.")
    assert await say(engine, way) == "No."
    assert remembered(engine) == ["When do you open?", "No."]
    assert not holds(CANARY, engine.chat_engine.chat_history)
    llm.text = ANSWER
    assert await say(engine, way, "Once more.") == ANSWER
    assert remembered(engine) == ["When do you open?", "No.", "Once more.", ANSWER]
    assert not holds(CANARY, llm.asked[-1], engine.chat_engine.chat_history)


@ways
@pytest.mark.parametrize("kind", ["context", "condense", "question"])
async def test_an_unsafe_node_refuses_the_answer(kind: str, way: str) -> None:
    engine = guarded(kind, Says(text=ANSWER), FACTS[0], BAD)
    assert await say(engine, way) == REFUSAL
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history)


@ways
@engines
async def test_a_violation_may_be_an_error_and_is_not_remembered(kind: str, way: str) -> None:
    llm = Says(text=BAD)
    engine = guarded(kind, llm, exit_behavior="error")
    with pytest.raises(RSafeViolationError, match="RSafe blocked the response"):
        await say(engine, way)
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history)
    llm.text = ANSWER
    assert await say(engine, way, "Again.") == ANSWER
    assert remembered(engine) == ["Again.", ANSWER]


@ways
@engines
async def test_what_was_said_before_a_refusal_is_still_known(kind: str, way: str) -> None:
    llm = Says(text=ANSWER)
    engine = guarded(kind, llm)
    await say(engine, way, "First.")
    llm.text = BAD
    assert await say(engine, way, "Second.") == REFUSAL
    llm.text, llm.asked = ANSWER, []
    assert await say(engine, way, "Third.") == ANSWER
    assert await say(engine, way, "Fourth.") == ANSWER
    assert holds("First.", llm.asked)
    assert holds("Third.", llm.asked)
    assert not holds(CANARY, llm.asked)
    said = ["First.", ANSWER, "Second.", REFUSAL, "Third.", ANSWER, "Fourth.", ANSWER]
    assert remembered(engine) == said


@ways
@pytest.mark.parametrize(
    "given", [ChatMessage(BAD, role="user"), ChatMessage(role="user", blocks=[ImageBlock()])]
)
@engines
async def test_a_callers_own_history_is_judged_with_the_message(
    kind: str, given: ChatMessage, way: str
) -> None:
    llm = Says(text=ANSWER)
    engine = guarded(kind, llm)
    assert await say(engine, way, "Hello.") == ANSWER
    llm.asked = []
    assert await say(engine, way, "Do it.", [given]) == REFUSAL
    assert llm.asked == []
    assert remembered(engine) == ["Hello.", ANSWER]


@ways
async def test_what_is_remembered_is_nobody_elses_to_change(way: str) -> None:
    given = [ChatMessage("Earlier.", role="user"), ChatMessage("Yes.", role="assistant")]
    engine = guarded("simple", Says(text=ANSWER))
    await say(engine, way, "Now.", given)
    given[0].blocks = engine.chat_history[1].blocks = []
    assert remembered(engine) == ["Earlier.", "Yes.", "Now.", ANSWER]


@ways
async def test_the_conversation_is_seen(way: str) -> None:
    backend = ScriptedBackend(SAFE)
    engine = guarded("simple", Says(text=ANSWER), backend=backend)
    await say(engine, way, "First.")
    await say(engine, way, "Second.")
    last = backend.requests[-1].messages[-1].content
    assert all(text in last for text in ("First.", "Second.", ANSWER))
    assert ANSWER in judged_text(backend.requests[-1])


@ways
async def test_a_callers_own_history_counts(way: str) -> None:
    backend = ScriptedBackend(SAFE)
    engine = guarded("simple", Says(text=ANSWER), backend=backend)
    await say(
        engine, way, "Now.", [ChatMessage("Earlier.", role="user"), ChatMessage("Yes.", role="assistant")]
    )
    assert "Earlier." in backend.requests[0].messages[-1].content
    assert remembered(engine) == ["Earlier.", "Yes.", "Now.", ANSWER]


@streams
async def test_a_stream_is_released_window_by_window(way: str) -> None:
    engine = guarded("simple", Says(text=f"All is fine so far, and then {BAD}"), stream_window=10)
    said = await say(engine, way)
    assert said.startswith("All is fine")
    assert said.endswith(REFUSAL)
    assert CANARY not in said
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history)


@streams
@engines
async def test_a_stream_that_nobody_reads_is_remembered_by_nobody(kind: str, way: str) -> None:
    llm = Says(text=BAD)
    engine = guarded(kind, llm)
    unread = await opened(engine, way, "Hello?")
    assert unread
    assert engine.chat_history == []
    llm.text = ANSWER
    assert await say(engine, way, "Are you there?") == ANSWER
    assert await say(engine, way, "Still?") == ANSWER
    assert remembered(engine) == ["Are you there?", ANSWER, "Still?", ANSWER]
    assert not holds(CANARY, engine.chat_engine.chat_history, llm.asked[-1])


@streams
@engines
async def test_the_end_of_a_stream_that_was_overtaken_uncovers_nothing(kind: str, way: str) -> None:
    llm = Says(text=ANSWER)
    engine = guarded(kind, llm)
    first = await opened(engine, way, "First.")
    second_says = Says(text=BAD)
    engine.chat_engine._llm = second_says  # type: ignore[attr-defined]
    if kind == "question":
        engine.chat_engine._query_engine = query_engine(second_says, *FACTS, streaming=True)  # type: ignore[attr-defined]
    second = await opened(engine, way, "Second.")
    assert await rest(first) == ANSWER
    assert remembered(engine) == []
    second_says.text, second_says.asked = ANSWER, []
    assert await say(engine, way, "Third.") == ANSWER
    assert not holds(CANARY, second_says.asked, engine.chat_history, engine.chat_engine.chat_history)
    assert await rest(second) == REFUSAL
    assert remembered(engine) == ["Third.", ANSWER]


@streams
async def test_an_answer_whose_reader_leaves_is_not_kept_for_another_engine(way: str) -> None:
    memory = ChatMemoryBuffer.from_defaults()
    inner = SimpleChatEngine.from_defaults(llm=Says(text=BAD), memory=memory)
    engine = RSafeChatEngine(inner, {"backend": guard_backend()}, stream_window=1)
    stream = await opened(engine, way, "When do you open?")
    if way == "stream_chat":
        next(stream.chat_stream)
        stream.chat_stream.close()
    else:
        await anext(stream.achat_stream)
        await stream.achat_stream.aclose()
        del stream
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if not memory.get_all():
                break
    assert memory.get_all() == []


@streams
async def test_a_stream_may_be_read_on_after_the_next_message(way: str) -> None:
    text = "All is fine so far, and that is how it will stay."
    engine = guarded("simple", Says(text=text), stream_window=10)
    stream = await opened(engine, way, "First.")
    if way == "stream_chat":
        said = next(chunks := stream.response_gen)
        assert await say(engine, way, "Second.") == text
        said += "".join(chunks)
    else:
        said = await anext(achunks := stream.async_response_gen())
        assert await say(engine, way, "Second.") == text
        said += "".join([chunk async for chunk in achunks])
    assert said == text
    assert remembered(engine) == ["Second.", text]


class Answers(Says):
    """Says something bad to what is bad."""

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        self.asked.append(prompt)
        if "Worse." not in prompt or REFUSAL in prompt:
            return CompletionResponse(text=ANSWER)
        return CompletionResponse(text="Worse." if "standalone question" in prompt.lower() else BAD)


@pytest.mark.parametrize("way", ["chat", "achat"])
@pytest.mark.parametrize("exit_behavior", ["replace", "error"])
@engines
async def test_turns_at_the_same_time_come_one_after_the_other(
    kind: str, exit_behavior: Any, way: str
) -> None:
    llm = Answers(text="")
    engine = guarded(kind, llm, exit_behavior=exit_behavior)
    turns = (say(engine, way, text) for text in ("Worse.", *(f"Good {number}." for number in range(3))))
    await asyncio.gather(*turns, return_exceptions=True)
    assert not holds(CANARY, llm.asked, engine.chat_history, engine.chat_engine.chat_history)
    messages = remembered(engine)[::2]
    assert set(messages) - {"Worse."} == {"Good 0.", "Good 1.", "Good 2."}
    assert ("Worse." in messages) == (exit_behavior == "replace")


class Stuck(Says):
    """Says nothing on an event loop as long as it is stuck."""

    free: Any
    heard: Any

    async def achat(self, messages: Any, **kwargs: Any) -> ChatResponse:
        self.heard.set()
        await self.free.wait()
        return ChatResponse(message=ChatMessage(self.text, role="assistant"))

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        async def said() -> AsyncIterator[ChatResponse]:
            response = await self.achat(messages)
            yield ChatResponse(message=response.message, delta=self.text)

        return said()


def stuck() -> Stuck:
    return Stuck(text=ANSWER, free=asyncio.Event(), heard=asyncio.Event())


@pytest.mark.parametrize("then", ["reset", "chat", "stream_chat", "chat in a thread"])
async def test_code_that_cannot_wait_for_a_stream_ends_it(then: str) -> None:
    engine = guarded("simple", llm := stuck())
    stream = await engine.astream_chat("First.")
    await llm.heard.wait()
    if then == "reset":
        engine.reset()
    elif then == "chat":
        assert str(engine.chat("Second.")) == ANSWER
    elif then == "stream_chat":
        assert "".join(engine.stream_chat("Second.").response_gen) == ANSWER
    else:
        assert await say(engine, "chat", "Second.") == ANSWER
    with pytest.raises(RuntimeError, match="before this answer was complete"):
        await rest(stream)
    assert remembered(engine) == ([] if then == "reset" else ["Second.", ANSWER])


@pytest.mark.parametrize("then", ["chat", "achat"])
@engines
def test_a_stream_whose_event_loop_is_closed_holds_nothing_up(kind: str, then: str) -> None:
    memory = ChatMemoryBuffer.from_defaults()
    llm = Says(text=BAD)
    engine = guarded(kind, llm)
    engine.chat_engine._memory = memory  # type: ignore[attr-defined]
    asyncio.run(engine.astream_chat("First."))
    llm.text = ANSWER
    assert (
        str(engine.chat("Again.")) if then == "chat" else str(asyncio.run(engine.achat("Again.")))
    ) == ANSWER
    assert remembered(engine) == ["Again.", ANSWER]
    assert not holds(CANARY, llm.asked[-1], memory.get_all())


async def test_sync_code_cannot_wait_for_a_turn_of_its_event_loop() -> None:
    engine = guarded("simple", llm := stuck())
    turn = asyncio.create_task(engine.achat("First."))
    await llm.heard.wait()
    with pytest.raises(RuntimeError, match="use its async methods"):
        engine.chat("Second.")
    llm.free.set()
    assert str(await turn) == ANSWER
    assert str(engine.chat("Third.")) == ANSWER


async def test_what_is_under_way_is_forgotten_as_well() -> None:
    engine = guarded("simple", llm := stuck())
    turn = asyncio.create_task(engine.achat("First."))
    await llm.heard.wait()
    engine.reset()
    llm.free.set()
    assert str(await turn) == ANSWER
    assert engine.chat_history == engine.chat_engine.chat_history == []


async def test_a_turn_that_gives_up_waiting_lets_the_next_one_wait() -> None:
    engine = guarded("simple", llm := stuck())
    first, second, third = (asyncio.create_task(engine.achat(text)) for text in ("1", "2", "3"))
    await llm.heard.wait()
    second.cancel()
    await asyncio.wait([second])
    llm.free.set()
    assert [str(await first), str(await third)] == [ANSWER, ANSWER]
    assert remembered(engine) == ["1", ANSWER, "3", ANSWER]


@pytest.mark.parametrize("way", ["achat", "astream_chat"])
@engines
async def test_an_engines_memory_does_not_block_the_event_loop(
    kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    inner: type[BaseChatEngine] = type(ENGINES[kind](Says(text="")))
    history, reset = inner.chat_history.fget, inner.reset  # type: ignore[attr-defined]

    def noted(method: Any) -> Any:
        def call(self: Any) -> Any:
            threads.add(threading.current_thread())
            return method(self)

        return call

    monkeypatch.setattr(inner, "chat_history", property(noted(history)))
    monkeypatch.setattr(inner, "reset", noted(reset))
    engine = guarded(kind, llm := Says(text=ANSWER))
    await say(engine, way)
    llm.text = BAD
    await say(engine, way)
    assert threads
    assert threading.current_thread() not in threads


@ways
async def test_forgetting(way: str) -> None:
    engine = guarded("simple", Says(text=BAD))
    await say(engine, way)
    engine.reset()
    assert engine.chat_history == []


@ways
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("on_error", ["block", "allow", "raise"])
async def test_a_failed_guard_does_what_on_error_says(way: str, fault: str, on_error: str) -> None:
    for check in ("check_message", "check_nodes", "check_response"):
        checks = {name: name == check for name in ("check_message", "check_nodes", "check_response")}
        settings = {"backend": ScriptedBackend(FAULTS[fault]), "timeout": 0.1, "on_error": on_error}
        inner = ENGINES["context"](Says(text=ANSWER), *FACTS)
        engine = RSafeChatEngine(inner, settings, **checks)  # type: ignore[arg-type]
        if on_error == "raise":
            with pytest.raises(Exception, match=r"."):
                await say(engine, way)
            assert ANSWER not in remembered(engine)
        else:
            assert await say(engine, way) == (ANSWER if on_error == "allow" else REFUSAL), check


@ways
async def test_an_engine_that_fails_leaves_the_conversation_as_it_was(way: str) -> None:
    class Fails(Says):
        def complete(self, *args: Any, **kwargs: Any) -> Any:
            raise ConnectionError("down")

        stream_complete = complete  # type: ignore[assignment]

    engine = guarded("simple", Fails(text=""))
    with pytest.raises(ConnectionError):
        await say(engine, way)
    assert engine.chat_history == engine.chat_engine.chat_history == []


@streams
async def test_a_guarded_query_engine_in_a_chat_engine_refuses_a_question_as_a_stream(way: str) -> None:
    inner = query_engine(Says(text=ANSWER), *FACTS, streaming=True)
    guarded_engine = RSafeQueryEngine(inner, {"backend": guard_backend()})
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=guarded_engine, llm=Says(text="q"))
    assert await say(chat, way, f"Tell me the {CANARY}.") == REFUSAL  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["achat", "astream_chat"])
async def test_what_failed_first_is_raised_where_the_memory_fails_then(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = guarded("simple", Says(text=ANSWER))
    failing = False

    async def failed(*_: object, **__: object) -> None:
        nonlocal failing
        failing = True
        raise asyncio.CancelledError

    def reset() -> None:
        if failing:
            raise RuntimeError("no such table")

    monkeypatch.setattr(engine.chat_engine, way, failed)
    monkeypatch.setattr(engine.chat_engine, "reset", reset)
    with pytest.raises(asyncio.CancelledError):
        await say(engine, way)
    with pytest.raises(RuntimeError, match="no such table"):
        await say(engine, way, "Again.")


class Slowly(Says):
    """Takes its time with each word."""

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        async def words() -> Any:
            said = ""
            for word in self.text.split():
                await asyncio.sleep(0.01)
                said += f"{word} "
                yield ChatResponse(message=ChatMessage(said, role="assistant"), delta=f"{word} ")

        return words()


@pytest.mark.parametrize("held_by", ["model", "guard"])
async def test_an_answer_whose_reader_is_cancelled_is_not_kept_for_another_engine(held_by: str) -> None:
    judging = asyncio.Event()

    async def judge(request: Any) -> str:
        if CANARY in str(request.messages):
            judging.set()
            await asyncio.Event().wait()
        return SAFE

    memory = ChatMemoryBuffer.from_defaults()
    inner = SimpleChatEngine.from_defaults(llm=Slowly(text=BAD), memory=memory)
    engine = RSafeChatEngine(inner, {"backend": ScriptedBackend(judge)})
    stream = await engine.astream_chat("When do you open?")

    async def read() -> None:
        async for _ in stream.async_response_gen():
            raise AssertionError("nothing may be seen before it is judged")

    reading = asyncio.create_task(read())
    await (judging.wait() if held_by == "guard" else asyncio.sleep(0))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert memory.get_all() == []
    assert engine.chat_history == []
