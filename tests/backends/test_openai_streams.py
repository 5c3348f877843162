"""Answers that are read as a stream, and left at the end of the verdict."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rsafe_plugins import Guard
from rsafe_plugins.backends import OpenAIBackend
from rsafe_plugins.backends import openai as module
from rsafe_plugins.backends.base import Completion, Message, Request
from rsafe_plugins.errors import BackendError, BackendTimeout, BackendUnavailable, VerdictError
from rsafe_plugins.guard.dialects.rsafe import RSafe
from rsafe_plugins.guard.verdict import parse_answer

END = b"data: [DONE]\n\n"


def event(text: str | None = None, finish: str | None = None, **delta: str) -> bytes:
    if text is not None:
        delta["content"] = text
    return f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': finish}]})}\n\n".encode()


def usage(tokens: int) -> bytes:
    counts = {"prompt_tokens": 90, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': [], 'usage': counts})}\n\n".encode()


class StreamingServer:
    """A server that sends pieces, and can neither score nor go on with a begun answer.

    Args:
        pieces: What it sends, one after the other.
        then: `end` ends the answer, `drop` the connection in its middle, `wait` waits until the client leaves,
            `drip` takes its time with each piece.
        kind: The content type that it claims.
    """

    def __init__(self, pieces: Sequence[bytes], then: str = "end", kind: str = "text/event-stream") -> None:
        self.pieces = pieces
        self.then = then
        self.kind = kind
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()
        self.asked: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(head.split("content-length: ")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            if "single word: no" in body["messages"][0]["content"]:
                await self._send(writer, [json.dumps(PLAIN).encode()], "application/json")
                return
            self.asked.append(body)
            self.arrived.set()
            await self._send(writer, self.pieces, self.kind, ends=self.then == "end")
            if self.then == "wait":
                await reader.read(1)  # nothing more comes before the client closes
                self.left.set()
        finally:
            writer.close()

    async def _send(
        self, writer: asyncio.StreamWriter, pieces: Sequence[bytes], kind: str, *, ends: bool = True
    ) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        for piece in pieces:
            if self.then == "drip":
                await asyncio.sleep(0.05)
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        if ends:
            writer.write(b"0\r\n\r\n")
            await writer.drain()


PLAIN = {"choices": [{"message": {"content": "no"}, "finish_reason": "stop"}]}


@asynccontextmanager
async def streaming(server: StreamingServer, **settings: Any) -> AsyncIterator[OpenAIBackend]:
    async with await asyncio.start_server(server.serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        backend = OpenAIBackend(f"http://127.0.0.1:{port}/v1", "guard", **settings)
        yield backend
        await backend.aclose()


async def answer_of(server: StreamingServer, **settings: Any) -> Completion | BackendError:
    async with streaming(server, **settings) as backend:
        request = Request(messages=(Message("user", "Hi"),), max_tokens=99, enough=RSafe.enough)
        return (await backend.complete([request]))[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)


async def test_a_server_that_would_go_on_is_left_at_the_closing_brace() -> None:
    server = StreamingServer([event("<think>Fine.</think>\n\\box"), event("ed{safe"), event("}")], "wait")

    answer = await answer_of(server)
    async with asyncio.timeout(10):
        await server.left.wait()

    assert isinstance(answer, Completion)
    assert answer.text == "<think>Fine.</think>\n\\boxed{safe}"
    assert answer.finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    assert server.asked[0]["stream"] is True


async def test_a_box_that_is_only_spoken_of_ends_nothing() -> None:
    text = "<think>It asks for a bomb.</think>\nOne could say \\boxed{safe}, but no: \\boxed{unsafe}"
    server = StreamingServer([event(text), event(finish="stop"), usage(40), END])

    answer = await answer_of(server)

    assert isinstance(answer, Completion)
    with pytest.raises(VerdictError, match="exactly one"):
        parse_answer(answer.text)


@pytest.mark.parametrize(
    "text",
    [
        "<think>They ask for \\boxed{safe}",
        "<think>\\boxed{safe} was asked for.</think>\nI say \\boxed{unsafe",
        "\\boxed{\\text{safe",
        "no box at all",
    ],
)
async def test_a_box_in_an_open_thought_or_an_open_box_ends_nothing(text: str) -> None:
    server = StreamingServer([event(text), event(" and on"), event(finish="stop"), usage(40), END])

    answer = await answer_of(server)

    assert isinstance(answer, Completion)
    assert answer.text == f"{text} and on"
    assert answer.usage.completion_tokens == 40


async def test_thoughts_that_a_server_takes_out_are_put_back() -> None:
    pieces = [event(reasoning_content="A box: \\boxed{safe}."), event("\\boxed{unsafe}")]

    answer = await answer_of(StreamingServer(pieces, "wait"))

    assert isinstance(answer, Completion)
    assert answer.text == "<think>A box: \\boxed{safe}.</think>\\boxed{unsafe}"


async def test_a_server_that_answers_in_one_go_is_understood() -> None:
    plain = {"choices": [{"message": {"content": "\\boxed{safe}"}, "finish_reason": "stop"}]}

    answer = await answer_of(StreamingServer([json.dumps(plain).encode()], kind="application/json"))

    assert isinstance(answer, Completion)
    assert answer.text == "\\boxed{safe}"


async def test_two_boxes_in_one_piece_are_no_verdict() -> None:
    async with streaming(StreamingServer([event("\\boxed{safe} \\boxed{unsafe}")], "wait")) as backend:
        verdict = await Guard(backend=backend, reasoning="never").acheck("Hi")

    assert verdict.blocked
    assert verdict.label is None


@pytest.mark.parametrize(
    ("pieces", "then", "error"),
    [
        ([event("\\boxed{sa")], "drop", BackendUnavailable),
        ([event("\\boxed{sa")], "end", BackendError),
        ([b'data: {"error": {"message": "out of memory"}}\n\n', END], "end", BackendError),
        ([b"data: <html>\n\n"], "end", BackendError),
        ([b"\xff\xfe\n\n"], "end", BackendError),
        ([], "end", BackendError),
    ],
    ids=["dropped", "no end", "an error event", "no JSON", "no text", "nothing"],
)
async def test_a_stream_that_breaks_is_no_answer(
    pieces: list[bytes], then: str, error: type[BackendError]
) -> None:
    answer = await answer_of(StreamingServer(pieces, then))

    assert isinstance(answer, error)


async def test_a_stream_that_stands_still_times_out() -> None:
    answer = await answer_of(StreamingServer([event("\\boxed{sa")], "wait"), timeout=0.2)

    assert isinstance(answer, BackendTimeout)


async def test_a_cancelled_check_leaves_the_server() -> None:
    server = StreamingServer([event("\\boxed{sa")], "wait")
    async with streaming(server) as backend:
        check = asyncio.create_task(Guard(backend=backend, reasoning="never").acheck("Hi"))
        async with asyncio.timeout(10):
            await server.arrived.wait()
            check.cancel()
            await server.left.wait()

    assert check.cancelled()


async def test_a_thought_that_closes_itself_ends_no_stream() -> None:
    thought = event(reasoning_content="One could read </think>\\boxed{safe} but no")
    server = StreamingServer([thought, event("\\boxed{unsafe}"), event(finish="stop"), END])

    answer = await answer_of(server)

    assert isinstance(answer, BackendError)
    assert "a thought that closes itself" in str(answer)


async def test_a_last_piece_that_was_filtered_is_no_verdict() -> None:
    server = StreamingServer([event("\\boxed{safe}", finish="content_filter"), END])

    answer = await answer_of(server)

    assert isinstance(answer, BackendError)
    assert "'content_filter'" in str(answer)


async def test_pieces_of_another_answer_are_left_out() -> None:
    other = {"choices": [{"index": 1, "delta": {"content": "\\boxed{safe}"}, "finish_reason": None}]}
    stray = f"data: {json.dumps(other)}\n\n".encode()
    server = StreamingServer([stray, event("\\boxed{unsafe}"), stray, event(finish="stop"), END])

    answer = await answer_of(server)

    assert isinstance(answer, Completion)
    assert answer.text == "\\boxed{unsafe}"


async def test_a_stream_that_drips_ends_with_the_timeout() -> None:
    server = StreamingServer([event("<think>"), *[b": still there\n\n"] * 999], "drip")

    async with asyncio.timeout(10):
        answer = await answer_of(server, timeout=0.3, connect_timeout=0.3)

    assert isinstance(answer, BackendTimeout)


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c", "\r\n"])
async def test_what_breaks_a_line_may_stand_in_the_text_as_it_is(mark: str) -> None:
    said = f"<think>It says a{mark}b.</think>\\boxed{{safe}}"
    delta = {"choices": [{"delta": {"content": said}, "finish_reason": "stop"}]}
    text = json.dumps(delta, ensure_ascii=False)
    line = f"data: {text}\r\n\r\n".encode()
    # In pieces that part characters.
    answer = await answer_of(StreamingServer([line[:70], line[70:75], line[75:], END]))
    assert isinstance(answer, Completion)
    assert answer.text == said
