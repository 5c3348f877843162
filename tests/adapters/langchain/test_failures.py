"""Whatever breaks in the guard, nothing passes unless the user said so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk

from rsafe_plugins import RSafeError
from rsafe_plugins.langchain import RSafeGuard, RSafeViolationError

CHUNKS = [AIMessageChunk("Flour "), AIMessageChunk("and water.")]
WAYS = ["invoke", "ainvoke", "batch", "abatch", "batch_as_completed", "stream", "transform", "atransform"]


async def ask(guard: RSafeGuard, way: str) -> list[Any]:
    """What comes out of the guard for safe content."""
    match way:
        case "invoke":
            return [guard.invoke("hi")]
        case "ainvoke":
            return [await guard.ainvoke("hi")]
        case "batch":
            return guard.batch(["hi", "ho"])
        case "abatch":
            return await guard.abatch(["hi", "ho"])
        case "batch_as_completed":
            return list(guard.batch_as_completed(["hi", "ho"]))
        case "stream":
            return list(guard.stream("hi"))
        case "transform":
            return list(guard.transform(iter(CHUNKS)))
        case _:

            async def chunks() -> Any:
                for chunk in CHUNKS:
                    yield chunk

            return [chunk async for chunk in guard.atransform(chunks())]


@pytest.mark.parametrize("way", WAYS)
async def test_failing_engine_blocks(failing: dict[str, Any], way: str, attack: str) -> None:
    with pytest.raises(RSafeViolationError, match="because the guard failed") as blocked:
        await ask(RSafeGuard(failing), way)
    assert blocked.value.verdict.label is None
    assert blocked.value.verdict.error is not None
    assert attack not in str(blocked.value)


@pytest.mark.parametrize("way", WAYS)
async def test_failing_engine_raises_where_the_user_said_so(failing: dict[str, Any], way: str) -> None:
    with pytest.raises(RSafeError) as failed:
        await ask(RSafeGuard({**failing, "on_error": "raise"}, exit_behavior="replace"), way)
    assert not isinstance(failed.value, RSafeViolationError)


@pytest.mark.parametrize("way", WAYS)
async def test_failing_engine_lets_through_only_where_the_user_said_so(
    failing: dict[str, Any], way: str
) -> None:
    passed = await ask(RSafeGuard({**failing, "on_error": "allow"}), way)
    assert passed


async def test_failing_engine_refuses_in_every_item(failing: dict[str, Any]) -> None:
    guard = RSafeGuard(failing, exit_behavior="replace", violation_message="No.")
    assert guard.batch(["hi", "ho"]) == ["No.", "No."]
    assert [chunk.content for chunk in guard.transform(iter(CHUNKS))] == ["No."]


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_cancelled_call_ends_as_cancelled_and_frees_the_engine(
    hanging: Any, return_exceptions: bool
) -> None:
    guard = RSafeGuard({"backend": hanging})
    task = asyncio.create_task(guard.abatch(["hi", "ho"], return_exceptions=return_exceptions))
    assert await asyncio.to_thread(hanging.asked.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(hanging.released.wait, 10)


async def test_cancelled_stream_lets_nothing_through(hanging: Any) -> None:
    task = asyncio.create_task(ask(RSafeGuard({"backend": hanging}), "atransform"))
    assert await asyncio.to_thread(hanging.asked.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
