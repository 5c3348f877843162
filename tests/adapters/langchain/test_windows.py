"""Streams that are released window by window."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from langchain_core.language_models._compat_bridge import chunks_to_events
from langchain_core.messages import AIMessageChunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import RunnableGenerator, RunnableLambda
from langchain_tests.utils.stream_lifecycle import assert_valid_event_stream
from support.canary import CANARY, SAFE, guard_backend
from support.langchain import Model, said

from rsafe_plugins import BackendError
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard.streams import Windows
from rsafe_plugins.langchain import RSafeGuard, RSafeViolationError
from rsafe_plugins.testing import ScriptedBackend

WORDS = ["The ", "sea ", "is ", "calm ", "and ", "blue."]


def source(chunks: Sequence[Any], drawn: list[Any] | None = None) -> Any:
    def sync(_: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            if drawn is not None:
                drawn.append(chunk)
            yield chunk

    async def asynchronous(given: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for _ in given:
            for chunk in sync(iter(())):
                yield chunk

    return RunnableGenerator(sync, asynchronous)


async def released(chain: Any, how: str, into: list[Any]) -> list[Any]:
    if how == "sync":
        into.extend(())
        for chunk in chain.stream("go"):
            into.append(chunk)
    else:
        async for chunk in chain.astream("go"):
            into.append(chunk)
    return into


def window(backend: ScriptedBackend, size: int, **settings: Any) -> RSafeGuard:
    return RSafeGuard({"backend": backend}, kind="response", stream_window=size, **settings)


both_ways = pytest.mark.parametrize("how", ["sync", "async"])


@both_ways
async def test_each_window_is_judged_with_all_before_it(how: str) -> None:
    backend = ScriptedBackend(SAFE)
    seen = await released(source(WORDS) | window(backend, 10), how, [])
    assert seen == WORDS
    judged = [request.messages[-1].content for request in backend.requests]
    wholes = ("The sea is", "The sea is calm and blue.")
    assert all(f"Agent: {whole}" in text for text, whole in zip(judged, wholes, strict=True))


@both_ways
async def test_what_a_window_blocks_is_not_handed_on(how: str) -> None:
    words = [*WORDS[:4], f"{CANARY} ", "and ", "more."]
    drawn: list[Any] = []
    seen: list[Any] = []
    with pytest.raises(RSafeViolationError):
        await released(source(words, drawn) | window(guard_backend(), 10), how, seen)
    assert seen == WORDS[:3]
    assert drawn[-1] == f"{CANARY} "  # the rest was not even asked for


@both_ways
async def test_a_word_over_two_windows_is_seen_whole(how: str) -> None:
    seen: list[Any] = []
    with pytest.raises(RSafeViolationError):
        await released(source([CANARY[:6], CANARY[6:], " more"]) | window(guard_backend(), 6), how, seen)
    assert seen == [CANARY[:6]]


@both_ways
async def test_a_blocked_window_may_end_with_the_refusal(how: str) -> None:
    guard = window(guard_backend(), 5, exit_behavior="replace", violation_message="No.")
    assert await released(source(["Fine. ", CANARY, " more"]) | guard, how, []) == ["Fine. ", "No."]


@both_ways
async def test_messages_are_released_as_they_came(how: str) -> None:
    chunks = [AIMessageChunk(word, id="1") for word in WORDS]
    assert await released(source(chunks) | window(ScriptedBackend(SAFE), 10), how, []) == chunks


@both_ways
@pytest.mark.parametrize("fault", [BackendError("down"), RuntimeError("bug"), "garbage", ""])
async def test_a_guard_that_fails_in_the_middle_releases_no_more(how: str, fault: Any) -> None:
    backend = ScriptedBackend([SAFE, fault, fault])
    seen: list[Any] = []
    with pytest.raises(RSafeViolationError, match="the guard failed"):
        await released(source(WORDS) | window(backend, 10), how, seen)
    assert seen == WORDS[:3]


async def test_mappings_have_windows_under_their_key() -> None:
    guard = window(guard_backend(), 5, input_key="answer")
    chunks = [{"source": "a book"}, {"answer": "Fine. "}, {"answer": CANARY}]
    seen: list[Any] = []
    with pytest.raises(RSafeViolationError):
        await released(source(chunks) | guard, "sync", seen)
    assert seen == chunks[:2]


@pytest.mark.parametrize(("size", "behavior"), [(0, "error"), (-5, "replace"), (100, "annotate")])
def test_a_window_that_makes_no_sense_is_refused(size: int, behavior: Any) -> None:
    with pytest.raises(
        SettingsError,
        match=r"stream_window (must be at least 1 character|can't go with exit_behavior='annotate')",
    ):
        window(ScriptedBackend(SAFE), size, exit_behavior=behavior)


def test_a_chain_that_does_not_stream_is_judged_once() -> None:
    backend = ScriptedBackend(SAFE)
    chain = RunnableLambda(lambda _: "".join(WORDS)) | window(backend, 10)
    assert list(chain.stream("go")) == ["".join(WORDS)]
    assert len(backend.requests) == 1


@pytest.mark.parametrize("size", [10, None])
def test_what_is_released_of_a_model_is_a_valid_stream_of_events(size: int | None) -> None:
    model = Model(replies=[said("The sea is calm and blue.")])
    guard = RSafeGuard({"backend": ScriptedBackend(SAFE)}, stream_window=size)
    chunks = [ChatGenerationChunk(message=chunk) for chunk in (model | guard).stream("How is the sea?")]
    events = list(chunks_to_events(iter(chunks)))
    assert len(events) > 2
    assert_valid_event_stream(events)


def piece(arguments: str, name: str | None = None) -> AIMessageChunk:
    call = {"name": name, "args": arguments, "id": name, "index": 0, "type": "tool_call_chunk"}
    return AIMessageChunk("", tool_call_chunks=[call])


def blocks(*texts: str) -> list[AIMessageChunk]:
    return [AIMessageChunk([{"type": "text", "text": text}]) for text in texts]


HALVES = CANARY[:3], CANARY[3:]


@both_ways
@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize(
    "chunks",
    [
        [piece('{"a": "b"}', "f"), piece(f" {CANARY} evil")],
        [piece(f'{{"a": "{CANARY}",', "f"), piece('"a": "fine"}')],
        [piece(f'{{"a": {CANARY}', "f")],
        blocks("Take the ", *HALVES),
        [AIMessageChunk(HALVES[0]), *blocks(HALVES[1])],
        [AIMessageChunk(HALVES[0]), AIMessageChunk([HALVES[1]])],
    ],
    ids=["behind a call", "overwritten", "broken", "blocks", "text and block", "text and list"],
)
async def test_what_the_reader_reads_is_judged_however_it_is_cut(
    how: str, size: int | None, chunks: Any
) -> None:
    guard = RSafeGuard({"backend": guard_backend()}, stream_window=size)
    with pytest.raises(RSafeViolationError):
        await released(source(chunks) | guard, how, [])


def test_a_call_that_parses_is_judged_once() -> None:
    backend = ScriptedBackend(SAFE)
    list(
        (source([piece('{"a": "gr\u00fc', "f"), piece('ezi"}')]) | RSafeGuard({"backend": backend})).stream(
            "go"
        )
    )
    (request,) = backend.requests
    assert request.messages[-1].content.count("gr\u00fcezi") == 1


def test_a_long_stream_is_never_put_together_from_its_start() -> None:
    joined: list[int] = []

    def join(chunks: Sequence[str]) -> str:
        joined.append(len(chunks))
        return "".join(chunks)

    stream = Windows(10, len, join)
    for _ in range(1000):
        if stream.add("abcde"):
            assert stream.together() == "abcde" * (len(joined) * 2)
            assert stream.release() == ["abcde"] * 2
    assert len(joined) == 500
    assert max(joined) == 3


@pytest.mark.parametrize(
    "settings", [{"exit_behavior": "stop"}, {"kind": "poem"}, {"stream_window": True}, {"stream_window": 0}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="must be"):
        RSafeGuard({"backend": guard_backend()}, **settings)
