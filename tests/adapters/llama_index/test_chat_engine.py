"""RSafeChatEngine around real chat engines; only the models are scripted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine, SimpleChatEngine
from llama_index.core.llms import ChatMessage
from support.canary import CANARY, SAFE, guard_backend, holds, judged_text
from support.llama_index import Found, Says

from rsafe_plugins import BackendError
from rsafe_plugins.backends import Request
from rsafe_plugins.llama_index import RSafeChatEngine, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

REFUSAL = "I can't help with that request."
ANSWER = "At nine in the morning."
BAD = f"Take the {CANARY} first."
FACTS = ("We open at 9.", "We close at 5.")
ENGINES = {
    "simple": lambda llm, *_: SimpleChatEngine.from_defaults(llm=llm),
    "context": lambda llm, *texts: ContextChatEngine.from_defaults(Found(*texts), llm=llm),
    "condense": lambda llm, *texts: CondensePlusContextChatEngine.from_defaults(Found(*texts), llm=llm),
}
WAYS = ("chat", "achat", "stream_chat", "astream_chat")
ways = pytest.mark.parametrize("way", WAYS)
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


@ways
@engines
async def test_a_safe_conversation_is_answered_and_remembered(kind: str, way: str) -> None:
    engine = guarded(kind, Says(text=ANSWER))
    assert await say(engine, way) == ANSWER
    assert await say(engine, way, "And close?") == ANSWER
    assert remembered(engine) == ["When do you open?", ANSWER, "And close?", ANSWER]
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
async def test_an_unsafe_node_refuses_the_answer(way: str) -> None:
    engine = guarded("context", Says(text=ANSWER), FACTS[0], BAD)
    assert await say(engine, way) == REFUSAL
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history)


@ways
async def test_a_violation_may_be_an_error_and_is_not_remembered(way: str) -> None:
    engine = guarded("simple", Says(text=BAD), exit_behavior="error")
    with pytest.raises(RSafeViolationError, match="RSafe blocked the response"):
        await say(engine, way)
    assert not holds(CANARY, engine.chat_history)


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


@pytest.mark.parametrize("way", ["stream_chat", "astream_chat"])
async def test_a_stream_is_released_window_by_window(way: str) -> None:
    engine = guarded("simple", Says(text=f"All is fine so far, and then {BAD}"), stream_window=10)
    said = await say(engine, way)
    assert said.startswith("All is fine")
    assert said.endswith(REFUSAL)
    assert CANARY not in said
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history)


@pytest.mark.parametrize("way", ["stream_chat", "astream_chat"])
async def test_a_stream_that_nobody_reads_is_remembered_by_nobody(way: str) -> None:
    llm = Says(text=BAD)
    engine = guarded("simple", llm)
    unread = engine.stream_chat("Hello?") if way == "stream_chat" else await engine.astream_chat("Hello?")
    assert unread
    assert not holds(CANARY, engine.chat_history)
    llm.text = ANSWER
    assert await say(engine, way, "Are you there?") == ANSWER
    assert not holds(CANARY, engine.chat_history, engine.chat_engine.chat_history, llm.asked[-1])


@ways
async def test_forgetting(way: str) -> None:
    engine = guarded("simple", Says(text=BAD))
    await say(engine, way)
    engine.reset()
    assert engine.chat_history == []


async def hang(request: Request) -> str:
    await asyncio.Event().wait()
    return SAFE


FAULTS: dict[str, Any] = {
    "times out": hang,
    "is down": BackendError("status 500"),
    "crashes": RuntimeError("segfault"),
    "writes garbage": "Sure, that is safe.",
    "writes nothing": "",
}


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
    assert remembered(engine) in ([], ["When do you open?"])
