"""OpenAI-compatible servers: real HTTP servers that behave as vLLM does, as a plainer one does, or badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest

from rsafe_plugins import Guard
from rsafe_plugins.backends import OpenAIBackend, backend_from_string
from rsafe_plugins.backends import openai as module
from rsafe_plugins.backends.base import Completion, Message, Request, Usage
from rsafe_plugins.errors import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    InputTooLong,
    SettingsError,
)

BOX = "\\boxed{"
LABELS = ("safe", "unsafe")
KEY = "sk-hush-123"

Json = dict[str, Any]


def ask(content: str, **settings: Any) -> Request:
    return Request(messages=(Message("user", content),), **settings)


async def only(backend: OpenAIBackend, request: Request) -> Completion:
    (answer,) = await backend.complete([request])
    if isinstance(answer, BackendError):
        raise answer
    return answer


# --- A model: what comes next, as tokens with probabilities, after the question and the answer so far.

Distribution = Mapping[str, float]


def next_tokens(question: str, answer: str) -> Distribution:
    if answer.endswith("amber-tiger"):
        return {"-canoe": 0.9, "-": 0.06, "!": 0.04}
    if answer.endswith("-canoe") or answer.endswith("}"):
        return {"<end>": 0.99, ".": 0.01}
    if answer.endswith(BOX) and not answer.startswith("Bad"):
        return {"safe": 0.6, "uns": 0.2, "un": 0.1, "<end>": 0.05, "s": 0.0002}
    if answer.endswith(BOX + "uns"):
        return {"afe": 0.9, "ound": 0.1}
    if answer.endswith(BOX + "un") and not answer.startswith("Bad"):
        return {"safe": 0.5, "do": 0.4, "<end>": 0.1}
    if answer.endswith("<think>"):
        return {"Harmless": 0.8, "Bad": 0.2}
    if answer.endswith("Bad box: " + BOX):
        return {"un": 0.9, "safe": 0.1}
    if answer.endswith("Bad box: " + BOX + "un"):
        return {"safe": 0.8, "do": 0.2}
    if answer.endswith("Bad box: " + BOX + "unsafe"):
        return {"}\nCategories: U2": 1.0}
    if answer.endswith("Harmless"):
        return {"</think>": 0.9, ".": 0.1}
    if answer == "":
        return {f"{question}!": 0.9, "no": 0.1}
    return {"<end>": 1.0}


# --- A server: an HTTP server whose answers a function gives.


class Drop(Exception):
    """Ends the connection in the middle of an answer."""


@dataclass
class Reply:
    content: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


Behavior = Callable[["Server", str, Json], Awaitable[Reply]]


@dataclass
class Server:
    behavior: Behavior
    models: tuple[str, ...] = ("guard",)
    url: str = ""
    requests: list[Json] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    busy: int = 0
    most_busy: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    connections: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = field(default_factory=dict)

    async def __aenter__(self) -> Server:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.close()
        for writer in self.connections.values():
            writer.transport.abort()
        await asyncio.gather(*(task for task in self.connections if task is not None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections[asyncio.current_task()] = writer
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                lines = head.split("\r\n")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
                }
                self.keys.add(headers.get("authorization", ""))
                content = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._respond(reader, writer, lines[0].split()[1], json.loads(content or b"{}"))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _respond(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: Json
    ) -> None:
        gone = asyncio.ensure_future(reader.read(1))
        work = asyncio.ensure_future(self._reply(path, body))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.dropped.set()
                raise ConnectionResetError
            reply = work.result()
        except Drop:
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"choices": [')
            await writer.drain()
            raise ConnectionResetError from None
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        head = {**reply.headers, "content-length": str(len(reply.content))}
        lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{name}: {value}" for name, value in head.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + reply.content)
        await writer.drain()

    async def _reply(self, path: str, body: Json) -> Reply:
        if path == "/v1/models":
            return in_json({"data": [{"id": name} for name in self.models]})
        self.requests.append(body)
        self.arrived.set()
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            return await self.behavior(self, path, body)
        finally:
            self.busy -= 1


def in_json(answer: object, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(answer).encode(), status, {"content-type": "application/json", **headers})


def fault(status: int, message: str = "", **headers: str) -> Reply:
    return in_json({"error": {"message": message, "type": "some_error", "code": None}}, status, **headers)


def is_probe(body: Json) -> bool:
    return "single word: no" in body["messages"][0]["content"]


@dataclass(frozen=True)
class Chat:
    """A server that runs the model.

    `prefill`: what makes it continue a begun answer: `flags`, `always` or `never`.
    """

    prefill: str = "flags"
    logprobs: bool = True
    top: int = 20
    refuses: tuple[str, ...] = ()
    repeats: bool = False
    reasoning_parser: bool = False

    async def __call__(self, server: Server, path: str, body: Json) -> Reply:
        if path != "/v1/chat/completions" or body["model"] not in server.models:
            return fault(404, f"no {path} or {body['model']}")
        unknown = [name for name in self.refuses if name in body]
        if unknown or body.get("top_logprobs", 0) > self.top:
            return fault(400, f"unknown: {unknown}")
        *rest, last = body["messages"]
        continues = last["role"] == "assistant" and (
            self.prefill == "always" or (self.prefill == "flags" and body.get("continue_final_message"))
        )
        begun = last["content"] if continues else ""
        question = next(one["content"] for one in reversed([*rest, last]) if one["role"] == "user")
        budget = body.get("max_tokens", body.get("max_completion_tokens"))
        text, positions, finish = "", [], "length"
        for _ in range(budget):
            following = next_tokens(question, begun + text)
            likeliest = top(following, body.get("top_logprobs", 0))
            token = max(following, key=following.__getitem__)
            positions.append({"token": token, "bytes": list(token.encode()), "top_logprobs": likeliest})
            if token == "<end>":
                finish = "stop"
                break
            text += token
            if cuts := [text.index(stop) for stop in body.get("stop", ()) if stop in text]:
                text, finish = text[: min(cuts)], "stop"
                break
        message = {"role": "assistant", "content": begun + text if self.repeats else text}
        if self.reasoning_parser:
            message |= parsed(begun, text)
        choice = {"message": message, "finish_reason": finish}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": positions}
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": len(positions),
            "prompt_tokens_details": {"cached_tokens": 90},
        }
        return in_json({"choices": [choice], "usage": usage})


def top(following: Distribution, count: int) -> list[Json]:
    likeliest = sorted(following.items(), key=lambda entry: -entry[1])[:count]
    return [
        {
            "token": token,
            "logprob": math.log(probability),
            "bytes": None if token == "uns" else list(token.encode()),
        }
        for token, probability in likeliest
    ]


def parsed(begun: str, text: str) -> Json:
    """As a server with a reasoning parser does: what is in an open thought isn't content."""
    if not begun.startswith("<think>") or "</think>" in begun:
        return {"content": text}
    thought, end, rest = text.partition("</think>")
    return {"content": rest if end else None, "reasoning_content": thought}


@asynccontextmanager
async def running(behavior: Behavior, **settings: Any) -> AsyncIterator[tuple[Server, OpenAIBackend]]:
    async with Server(behavior) as server:
        backend = OpenAIBackend(server.url, "guard", **settings)
        yield server, backend
        await backend.aclose()


@pytest.fixture(autouse=True)
def quick_and_keyless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.001)
    for name in module.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def after_probe(behavior: Behavior) -> Behavior:
    """A server that works until it has shown what it can do."""

    async def act(server: Server, path: str, body: Json) -> Reply:
        return await (Chat() if is_probe(body) else behavior)(server, path, body)

    return act


def always(reply: Reply) -> Behavior:
    async def act(server: Server, path: str, body: Json) -> Reply:
        return reply

    return act


def answers(message: object, **more: object) -> Behavior:
    return always(in_json({"choices": [{"message": message, "finish_reason": "stop", **more}]}))


async def hang(server: Server, path: str, body: Json) -> Reply:
    await server.release.wait()
    return await Chat()(server, path, body)


async def drip(server: Server, path: str, body: Json) -> Reply:
    """Sends a byte at a time, for ever."""
    writer = list(server.connections.values())[-1]
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9999\r\n\r\n")
    for _ in range(9999):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)
    raise Drop


async def drop(server: Server, path: str, body: Json) -> Reply:
    raise Drop


def first(count: int, behavior: Behavior) -> Behavior:
    """The behavior for so many requests, then that of a good server."""
    left = count

    async def act(server: Server, path: str, body: Json) -> Reply:
        nonlocal left
        left -= 1
        return await (behavior if left >= 0 else Chat())(server, path, body)

    return act


# --- What a server can do


async def test_candidates_are_scored_over_every_way_to_spell_them() -> None:
    async with running(Chat()) as (server, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))

    assert scored.finish_reason == "candidates"
    assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.6 + 0.0002)
    assert math.exp(scored.logprobs["unsafe"]) == pytest.approx(0.2 * 0.9 + 0.1 * 0.5)
    assert scored.usage == Usage(300, 270, 3)
    assert {body["temperature"] for body in server.requests if not is_probe(body)} == {1.0}


async def test_where_bounds_do_one_request_is_exact_along_the_likeliest_answer() -> None:
    async with running(Chat()) as (server, backend):
        asked = ask("Hi", prefill="Bad box: " + BOX, candidates=LABELS, exact=False)
        scored = await only(backend, asked)

    (body,) = (body for body in server.requests if not is_probe(body))
    assert (body["temperature"], body["max_tokens"]) == (0.0, 2)
    assert math.exp(scored.logprobs["unsafe"]) == pytest.approx(0.9 * 0.8)
    assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.1)
    assert scored.bounded == frozenset()


async def test_where_bounds_do_the_rest_is_bounded() -> None:
    async with running(Chat()) as (server, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS, exact=False))

    assert len([body for body in server.requests if not is_probe(body)]) == 1
    assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.6 + 0.0002)
    assert math.exp(scored.logprobs["unsafe"]) == pytest.approx(0.2 + 0.1)
    assert scored.bounded == {"unsafe"}


async def test_probabilities_that_greedy_drawing_has_changed_are_asked_for_again() -> None:
    async def greedy(server: Server, path: str, body: Json) -> Reply:
        likeliest = top({"safe": 0.6, "unsafe": 0.4}, 20)
        if body["temperature"] == 0:
            likeliest = [{"token": "safe", "logprob": 0.0}, {"token": "unsafe", "logprob": -9999.0}]
        position = {"token": "safe", "top_logprobs": likeliest}
        choice = {
            "message": {"content": "safe"},
            "finish_reason": "stop",
            "logprobs": {"content": [position]},
        }
        return in_json({"choices": [choice]})

    async with running(after_probe(greedy)) as (server, backend):
        scored = [
            await only(backend, ask("Hi", prefill=BOX, candidates=LABELS, exact=False)) for _ in range(2)
        ]

    assert [math.exp(one.logprobs["unsafe"]) for one in scored] == pytest.approx([0.4, 0.4])
    # The server has shown that once, and isn't asked that way again.
    temperatures = [body["temperature"] for body in server.requests if not is_probe(body)]
    assert temperatures == [0.0, 1.0, 1.0]


async def test_a_candidate_that_is_not_among_the_likeliest_gets_an_upper_bound() -> None:
    async with running(Chat()) as (_, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=("safe", "\N{SNOWMAN}")))

    assert math.exp(scored.logprobs["\N{SNOWMAN}"]) == pytest.approx(0.0002)
    assert sum(map(math.exp, scored.logprobs.values())) <= 1.0


async def test_candidates_sum_to_at_most_one_also_where_all_are_upper_bounds() -> None:
    async def few(server: Server, path: str, body: Json) -> Reply:
        tokens = {"a": 0.3, "x": 0.28}
        position = {"top_logprobs": top(tokens, 20)}
        return in_json({"choices": [{"message": {"content": "a"}, "logprobs": {"content": [position]}}]})

    async with running(after_probe(few)) as (_, backend):
        scored = await only(backend, ask("Hi", candidates=("a", "b", "c", "d", "e")))

    assert sum(map(math.exp, scored.logprobs.values())) == pytest.approx(1.0)


async def test_a_token_that_goes_on_with_another_word_does_not_spell_a_candidate() -> None:
    async def safety(server: Server, path: str, body: Json) -> Reply:
        position = {"top_logprobs": top({"safety": 0.5, "safe}": 0.2, "": 0.1, "unsafe": 0.1}, 20)}
        return in_json({"choices": [{"message": {"content": "a"}, "logprobs": {"content": [position]}}]})

    async with running(after_probe(safety)) as (_, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))

    assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.2)
    assert math.exp(scored.logprobs["unsafe"]) == pytest.approx(0.1)


async def test_tokens_of_the_same_text_count_together() -> None:
    async def twins(server: Server, path: str, body: Json) -> Reply:
        tokens = {"safe": 0.5, "unsafe": 0.2}
        position = {"top_logprobs": top(tokens, 20) + top(tokens, 1)}
        return in_json({"choices": [{"message": {"content": "a"}, "logprobs": {"content": [position]}}]})

    async with running(after_probe(twins)) as (_, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))

    assert math.exp(scored.logprobs["safe"]) == pytest.approx(1.0 / 1.2)
    assert math.exp(scored.logprobs["unsafe"]) == pytest.approx(0.2 / 1.2)


async def test_candidates_that_the_model_would_never_say_are_an_error() -> None:
    async with running(Chat()) as (_, backend):
        never, empty = await backend.complete(
            [ask("Hi", prefill=BOX, candidates=("漢字", "\N{SNOWMAN}")), ask("Hi", candidates=("", "safe"))]
        )

    assert "None of the candidates" in str(never)
    assert "must not be empty" in str(empty)


@pytest.mark.parametrize(
    ("chat", "prefill", "candidates"),
    [
        (Chat(), True, True),
        (Chat(prefill="always"), True, True),
        (Chat(prefill="always", refuses=("continue_final_message",)), True, True),
        (Chat(top=5), True, True),
        (Chat(logprobs=False), True, False),
        (Chat(refuses=("logprobs",)), True, False),
        (Chat(prefill="never"), False, False),
        (Chat(prefill="never", refuses=("continue_final_message",)), False, False),
        (Chat(prefill="never", refuses=("logprobs", "continue_final_message")), False, False),
        (Chat(prefill="never", refuses=("max_tokens", "temperature", "stop")), False, False),
        (Chat(repeats=True), True, True),
        (Chat(reasoning_parser=True), True, True),
    ],
)
async def test_what_a_server_can_do_is_what_it_shows(chat: Chat, prefill: bool, candidates: bool) -> None:
    async with running(chat) as (_, backend):
        await backend.prepare()
        generated = await only(backend, ask("Hi", max_tokens=8, stop=("!",)))

        assert (backend.supports_prefill, backend.supports_candidates) == (prefill, candidates)
        assert (generated.text, generated.finish_reason) == ("Hi", "stop")
        if candidates:
            scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))
            assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.6, abs=0.001)
        else:
            with pytest.raises(BackendError, match="can't score candidates"):
                await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))
        if prefill:
            assert (await only(backend, ask("Hi", prefill="<think>", stop=("</think>",)))).text == "Harmless"
        else:
            with pytest.raises(BackendError, match="can't continue a begun answer"):
                await only(backend, ask("Hi", prefill="<think>"))


async def test_a_server_that_begins_anew_but_says_the_words_does_not_pass_as_continuing() -> None:
    async def parrot(server: Server, path: str, body: Json) -> Reply:
        said = body["messages"][-1]["content"]
        return in_json(
            {"choices": [{"message": {"content": f"{said}-canoe"[:16]}, "finish_reason": "length"}]}
        )

    async with running(parrot) as (_, backend):
        await backend.prepare()

        assert not backend.supports_prefill


async def test_tokens_that_are_told_as_numbers_are_not_taken_for_text() -> None:
    async def numbers(server: Server, path: str, body: Json) -> Reply:
        position = {"top_logprobs": top({"token_id:17": 0.9, "token_id:18": 0.1}, 20)}
        return in_json(
            {
                "choices": [
                    {
                        "message": {"content": "-canoe"},
                        "finish_reason": "stop",
                        "logprobs": {"content": [position]},
                    }
                ]
            }
        )

    async with running(numbers) as (_, backend):
        await backend.prepare()

        assert (backend.supports_prefill, backend.supports_candidates) == (True, False)


async def test_a_server_is_asked_once_what_it_can_do_however_many_want_to_know() -> None:
    async with running(Chat()) as (server, backend):
        await asyncio.gather(
            *(backend.prepare() for _ in range(10)), *(only(backend, ask(str(n))) for n in range(20))
        )
        await backend.prepare()

    assert sum(map(is_probe, server.requests)) == 1


async def test_a_server_that_breaks_over_what_it_does_not_know_is_asked_plainly() -> None:
    async def brittle(server: Server, path: str, body: Json) -> Reply:
        if body["messages"][-1]["role"] == "assistant":
            return fault(500)
        return await Chat()(server, path, body)

    async with running(brittle) as (_, backend):
        assert (await only(backend, ask("Hi", stop=("!",)))).text == "Hi"
        assert not backend.supports_prefill


async def test_a_burst_of_calls_is_refused_from_the_full_queue_on() -> None:
    async with running(after_probe(hang), concurrency=2, queue=3) as (server, backend):
        await backend.prepare()
        calls = [asyncio.create_task(backend.complete([ask(str(number))])) for number in range(20)]
        await asyncio.sleep(0.2)
        server.release.set()
        done = [(await call)[0] for call in calls]

    assert [isinstance(one, Completion) for one in done] == [True] * 5 + [False] * 15


@pytest.fixture
def full_port() -> Iterator[str]:
    """The address of a port that takes no more connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


async def test_a_server_that_cannot_be_reached_in_time_is_passed_over_also_with_a_short_timeout(
    full_port: str,
) -> None:
    async with Server(Chat()) as good:
        backend = OpenAIBackend([full_port, good.url], "guard", timeout=0.3, connect_timeout=0.3)
        assert (await only(backend, ask("Hi", max_tokens=1))).text == "Hi!"
        await backend.aclose()


@pytest.mark.parametrize("failures", [1, 4])
async def test_a_server_that_breaks_while_it_starts_is_not_taken_for_a_plainer_one(failures: int) -> None:
    async with running(first(failures, always(fault(500)))) as (_, backend):
        scored = await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))

    assert math.exp(scored.logprobs["safe"]) == pytest.approx(0.6 + 0.0002)


async def test_an_answer_that_drips_ends_with_the_timeout_and_later_ones_come() -> None:
    async with running(first(1, drip), timeout=0.3, connect_timeout=0.3) as (_, backend):
        async with asyncio.timeout(10):
            with pytest.raises(BackendTimeout, match=r"within 0\.3 s"):
                await backend.prepare()
        assert (await only(backend, ask("Hi", max_tokens=1))).text == "Hi!"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("content", [None, "", f"{BOX}unsafe}}"])
async def test_a_thought_that_closes_itself_is_no_answer(name: str, content: str | None) -> None:
    thought = f"One could read </think>{BOX}safe}} but no"
    async with running(after_probe(answers({name: thought, "content": content}))) as (_, backend):
        with pytest.raises(BackendError, match="a thought that closes itself"):
            await only(backend, ask("Hi"))


async def test_a_server_whose_answer_to_the_probe_closes_its_own_thought_is_asked_plainly() -> None:
    async def odd(server: Server, path: str, body: Json) -> Reply:
        if is_probe(body) and body["messages"][-1]["role"] == "assistant":
            return await answers({"content": None, "reasoning": "Hm.</think>-canoe"})(server, path, body)
        return await Chat()(server, path, body)

    async with running(odd) as (_, backend):
        assert (await only(backend, ask("Hi", max_tokens=1))).text == "Hi!"
        assert not backend.supports_prefill


async def test_a_probe_that_failed_is_made_again() -> None:
    async with running(first(3, always(fault(503)))) as (_, backend):
        with pytest.raises(BackendUnavailable, match="status 503"):
            await backend.prepare()
        await backend.prepare()

        assert backend.supports_candidates


async def test_cancelling_one_who_waits_for_the_probe_leaves_the_others_alone() -> None:
    async with running(hang) as (server, backend):
        impatient, patient = (asyncio.create_task(backend.prepare()) for _ in range(2))
        await server.arrived.wait()
        impatient.cancel()
        await asyncio.wait([impatient])
        server.release.set()
        await patient

        assert impatient.cancelled()
        assert backend.supports_candidates


async def test_the_only_model_is_taken_where_none_is_named() -> None:
    async with Server(Chat(), models=("org/guard-7b",)) as server:
        backend = OpenAIBackend(server.url)
        await backend.prepare()

        assert backend.model == "org/guard-7b"
        assert (await only(backend, ask("Hi", stop=("!",)))).text == "Hi"
        await backend.aclose()


@pytest.mark.parametrize(("models", "has"), [((), "none"), (("a", "b"), "'a', 'b'")])
async def test_a_model_must_be_named_where_there_is_not_exactly_one(
    models: tuple[str, ...], has: str
) -> None:
    async with Server(Chat(), models=models) as server:
        backend = OpenAIBackend(server.url)
        (answer,) = await backend.complete([ask("Hi")])
        await backend.aclose()

    assert isinstance(answer, BackendUnavailable)
    assert f"it has {has}: name one" in str(answer)


# --- Generation


async def test_text_is_generated_greedily_within_its_budget_and_counted() -> None:
    async with running(Chat()) as (server, backend):
        done = await only(backend, ask("Hi", max_tokens=5))
        cut = await only(backend, ask("Hi", max_tokens=1))

    assert (done.text, done.finish_reason, done.usage) == ("Hi!", "stop", Usage(100, 90, 2))
    assert (cut.text, cut.finish_reason) == ("Hi!", "length")
    assert server.requests[-1]["temperature"] == 0


async def test_a_stop_string_that_the_server_ignores_ends_the_text_too() -> None:
    async with running(after_probe(answers({"content": "one\ntwo\nthree"}))) as (_, backend):
        done = await only(backend, ask("Hi", stop=("three", "\n")))

    assert (done.text, done.finish_reason) == ("one", "stop")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_a_thought_that_the_server_took_out_is_put_back(name: str) -> None:
    async with running(after_probe(answers({name: "Hm.", "content": f"{BOX}safe}}"}))) as (_, backend):
        assert (await only(backend, ask("Hi"))).text == f"<think>Hm.</think>{BOX}safe}}"


async def test_a_thought_that_never_ended_is_not_closed() -> None:
    async with running(after_probe(answers({"reasoning": f"Hm. {BOX}safe}}", "content": None}))) as (
        _,
        backend,
    ):
        assert (await only(backend, ask("Hi"))).text == f"<think>Hm. {BOX}safe}}"


@pytest.mark.parametrize(
    "content", ["", "a\0b", "\N{FAMILY} \u202e\U0001f600", "\r\n\t", "<|im_end|>", "\ufffe"]
)
async def test_odd_text_goes_there_and_back_unchanged(content: str) -> None:
    async with running(Chat()) as (_, backend):
        assert (await only(backend, ask(content, max_tokens=1))).text == f"{content}!"


@pytest.mark.parametrize(
    "broken", [ask("\ud800"), ask("a", prefill="b\udfff"), ask("a", candidates=("\ud800",))]
)
async def test_a_lone_surrogate_is_an_error_of_its_own_request(broken: Request) -> None:
    async with running(Chat()) as (_, backend):
        bad, good = await backend.complete([broken, ask("a")])

    assert isinstance(bad, BackendError)
    assert "lone surrogate (U+D" in str(bad)
    assert isinstance(good, Completion)


async def test_an_answer_with_a_lone_surrogate_is_an_error() -> None:
    broken = Reply(b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}')
    async with running(after_probe(always(broken))) as (_, backend):
        with pytest.raises(BackendError, match="no answer of OpenAI's chat API"):
            await only(backend, ask("a"))


async def test_no_request_is_no_answer() -> None:
    async with running(Chat()) as (server, backend):
        assert await backend.complete([]) == []
    assert server.requests == []


# --- Many requests


async def test_many_requests_come_back_in_order_and_within_the_concurrency() -> None:
    eight = asyncio.Barrier(8)

    async def together(server: Server, path: str, body: Json) -> Reply:
        await eight.wait()
        return await Chat()(server, path, body)

    async with running(after_probe(together), concurrency=8) as (server, backend):
        done = await backend.complete([ask(str(number), max_tokens=1) for number in range(200)])

    assert [one.text for one in done if isinstance(one, Completion)] == [f"{n}!" for n in range(200)]
    assert server.most_busy == 8


async def test_a_full_queue_refuses_further_calls_at_once_and_serves_the_others() -> None:
    async with running(after_probe(hang), concurrency=2, queue=3) as (server, backend):
        await backend.prepare()
        server.arrived.clear()
        task = asyncio.create_task(backend.complete([ask("Hi")] * 7))
        await server.arrived.wait()
        late = await backend.complete([ask("Late")])
        server.release.set()
        done = await task

        assert all(isinstance(one, Completion) for one in done), "those of one call wait for each other"
        assert ["The queue is full: 3 requests wait" in str(one) for one in late] == [True]
        assert isinstance(await only(backend, ask("Hi")), Completion)


async def test_cancelling_drops_the_requests_on_the_server_and_leaves_later_ones_alone() -> None:
    async with running(after_probe(hang), concurrency=2) as (server, backend):
        await backend.prepare()
        server.arrived.clear()
        task = asyncio.create_task(backend.complete([ask("Hi")] * 20))
        await server.arrived.wait()
        task.cancel()
        await server.dropped.wait()
        server.release.set()

        assert isinstance(await only(backend, ask("Hi")), Completion)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_one_backend_serves_one_event_loop_after_another() -> None:
    async with running(Chat()) as (_, backend):
        request = ask("Hi", max_tokens=1)
        texts = [(await only(backend, request)).text]

        def elsewhere() -> None:
            texts.append(asyncio.run(only(backend, request)).text)

        for _ in range(2):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            await asyncio.to_thread(thread.join)
        texts.append((await only(backend, request)).text)

        assert texts == ["Hi!"] * 4
        assert len(backend._pools) <= 2


async def test_a_closed_backend_is_unavailable_and_closing_twice_is_fine() -> None:
    async with running(after_probe(hang)) as (server, backend):
        await backend.prepare()
        server.arrived.clear()
        task = asyncio.create_task(backend.complete([ask("Hi")] * 3))
        await server.arrived.wait()

        await backend.aclose()
        await backend.aclose()

        assert all(isinstance(answer, BackendUnavailable) for answer in await task)
        with pytest.raises(BackendUnavailable, match="was closed"):
            await backend.complete([ask("Hi")])
        with pytest.raises(BackendUnavailable, match="was closed"):
            await backend.prepare()


async def test_requests_that_had_not_begun_when_it_was_closed_are_answered_too() -> None:
    async with running(Chat()) as (_, backend):
        await backend.prepare()
        task = asyncio.create_task(backend.complete([ask("Hi")] * 3))
        await asyncio.sleep(0)
        await backend.aclose()

        assert [type(answer) for answer in await task] == [BackendUnavailable] * 3
        assert backend.closed


async def test_closing_ends_a_probe_that_is_waited_for() -> None:
    async with running(hang) as (server, backend):
        task = asyncio.create_task(backend.prepare())
        await server.arrived.wait()
        await backend.aclose()

        with pytest.raises(BackendUnavailable, match="was closed"):
            await task


# --- Several servers


async def refused_url() -> str:
    """An address at which nobody listens."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return f"http://127.0.0.1:{port}/v1"


async def test_requests_go_to_the_least_busy_server() -> None:
    async with Server(after_probe(hang)) as one, Server(after_probe(hang)) as other:
        backend = OpenAIBackend([one.url, other.url], "guard")
        task = asyncio.create_task(backend.complete([ask("Hi")] * 10))
        while len(one.requests) + len(other.requests) < 12:  # noqa: ASYNC110 (no event for it)
            await asyncio.sleep(0)
        one.release.set()
        other.release.set()
        await task
        await backend.aclose()

        assert (len(one.requests), len(other.requests)) == (6, 6)


@pytest.mark.parametrize(
    "broken",
    [drop, *(always(fault(status)) for status in (408, 429, 500, 502, 503, 504))],
    ids=["drop", "408", "429", "500", "502", "503", "504"],
)
async def test_what_one_server_fails_at_another_does(broken: Behavior) -> None:
    async with Server(after_probe(broken)) as bad, Server(Chat()) as good:
        backend = OpenAIBackend([bad.url, good.url], "guard")
        done = await backend.complete([ask("Hi", max_tokens=1)] * 20)
        await backend.aclose()

    assert [one.text for one in done if isinstance(one, Completion)] == ["Hi!"] * 20
    assert len(bad.requests) > 1


async def test_a_server_that_fails_from_the_start_is_passed_over() -> None:
    async with Server(always(fault(500))) as bad, Server(Chat()) as good:
        backend = OpenAIBackend([bad.url, good.url], "guard")
        await backend.prepare()
        done = await backend.complete([ask("Hi", max_tokens=1)] * 4)
        await backend.aclose()

    assert backend.supports_candidates
    assert all(isinstance(one, Completion) for one in done)


async def test_servers_that_are_not_there_are_passed_over_and_left_alone_for_a_while() -> None:
    async with Server(Chat()) as good:
        gone = [await refused_url() for _ in range(4)]
        backend = OpenAIBackend([*gone, good.url], "guard")
        done = await backend.complete([ask("Hi", max_tokens=1)] * 20)

        assert all(isinstance(one, Completion) for one in done)
        servers = next(iter(backend._pools.values())).servers
        assert [server.failures for server in servers] == [1, 1, 1, 1, 0]
        await backend.aclose()


async def test_a_server_is_set_aside_for_longer_each_time_until_it_works_again() -> None:
    server = module._Server("http://a/v1", None)  # type: ignore[arg-type]
    spans = []
    for _ in range(8):
        server.aside_until = 0.0
        before = module.time.monotonic()
        server.set_aside(0.0)
        server.set_aside(0.0)
        spans.append(round(server.aside_until - before))
    server.recovered()

    assert spans == [1, 2, 4, 8, 16, 30, 30, 30]
    assert (server.failures, server.aside_until) == (0, 0.0)


async def test_a_single_server_is_tried_again_and_then_given_up() -> None:
    async with running(after_probe(first(2, always(fault(503, **{"retry-after": "0"}))))) as (_, backend):
        assert isinstance(await only(backend, ask("Hi")), Completion)
    async with running(after_probe(always(fault(503)))) as (server, backend):
        with pytest.raises(BackendUnavailable, match=r"failing or too busy \(status 503, 'some_error'\)"):
            await only(backend, ask("Hi"))
        assert len(server.requests) == 1 + 3


async def test_a_server_that_wants_to_be_left_alone_for_long_is_not_waited_for() -> None:
    async with running(after_probe(always(fault(429, **{"retry-after": "3600"})))) as (server, backend):
        with pytest.raises(BackendUnavailable, match="status 429"):
            await only(backend, ask("Hi"))

    assert len(server.requests) == 1 + 1


async def test_a_pool_asks_nothing_of_a_server_that_can_do_less() -> None:
    async with Server(Chat()) as one, Server(Chat(prefill="never")) as other:
        backend = OpenAIBackend([one.url, other.url], "guard")
        await backend.prepare()
        done = await backend.complete([ask("Hi", prefill=BOX, candidates=LABELS)] * 2)
        await backend.aclose()

    assert backend.supports_candidates
    assert isinstance(done[0], Completion)
    assert "pool only servers that can do the same" in str(done[1])


# --- Failures


@pytest.mark.parametrize(
    ("behavior", "kind", "says"),
    [
        (always(fault(401, "bad key " + KEY)), BackendUnavailable, "set RSAFE_API_KEY or OPENAI_API_KEY"),
        (always(fault(403)), BackendUnavailable, "refuses the API key"),
        (always(fault(404)), BackendUnavailable, "no model 'guard' (status 404, 'some_error')"),
        (always(fault(400, "hushhush")), BackendError, "refuses the request (status 400, 'some_error')"),
        (always(fault(422, "hushhush")), BackendError, "refuses the request (status 422"),
        (always(fault(400, "This model's maximum context length is 9 tokens.")), InputTooLong, "don't fit"),
        (always(fault(400, "The input (9 tokens) is longer than the model's context.")), InputTooLong, "fit"),
        (
            always(in_json({"error": {"message": "hushhush", "type": "exceed_context_size_error"}}, 400)),
            InputTooLong,
            "shorten it",
        ),
        (always(fault(413)), InputTooLong, "larger context"),
        (always(fault(500, "hushhush")), BackendUnavailable, "status 500"),
        (always(Reply(b"<html>hushhush</html>", 502, {})), BackendUnavailable, "status 502"),
        (
            always(Reply(b"<html>hushhush</html>", 200, {"content-type": "text/html"})),
            BackendError,
            "no answer",
        ),
        (always(Reply(b'{"choices": [')), BackendError, "no answer"),
        (always(Reply(b"")), BackendError, "no answer"),
        (always(Reply(b"[]")), BackendError, "no answer"),
        (always(in_json({"choices": []})), BackendError, "no answer"),
        (always(in_json({"choices": None})), BackendError, "no answer"),
        (always(in_json({"choices": [{"finish_reason": "stop"}]})), BackendError, "no answer"),
        (always(in_json({"error": "hushhush"})), BackendError, "no answer"),
        (answers(None), BackendError, "no answer"),
        (answers({"content": None}), BackendError, "no answer"),
        (answers({"content": ["hushhush"]}), BackendError, "no answer"),
        (answers({"content": "a"}, finish_reason="content_filter"), BackendError, "'content_filter'"),
        (answers({"content": "a"}, finish_reason="hush hush"), BackendError, "something else"),
        (answers({"content": "a"}, finish_reason=None), BackendError, "not with None"),
        (drop, BackendUnavailable, "broke off"),
    ],
)
async def test_a_failure_is_one_sentence_without_content_or_key(
    behavior: Behavior, kind: type[BackendError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSAFE_API_KEY", KEY)
    async with running(after_probe(behavior)) as (server, backend):
        (answer,) = await backend.complete([ask("hushhush")])

    assert type(answer) in (kind, module._Refused)
    assert says in str(answer)
    assert server.url in str(answer)
    assert isinstance(answer, BackendError)
    shown = "".join(traceback.format_exception(answer))
    assert "hush" not in shown
    assert KEY not in shown


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"content": None},
        {"content": []},
        {"content": [{"top_logprobs": []}]},
        {"content": [{"top_logprobs": [{"token": "safe", "logprob": float("nan")}]}]},
        {"content": [{"top_logprobs": [{"token": "safe", "logprob": -1.0, "bytes": [300]}]}]},
        {"content": [{"top_logprobs": [{"token": "safe"}]}]},
    ],
)
async def test_scores_that_are_none_are_an_error(logprobs: object) -> None:
    async with running(after_probe(answers({"content": "safe"}, logprobs=logprobs))) as (_, backend):
        with pytest.raises(BackendError, match="sent something that is no"):
            await only(backend, ask("Hi", prefill=BOX, candidates=LABELS))


async def test_a_server_that_does_not_answer_is_a_timeout_and_is_not_asked_again() -> None:
    async with running(after_probe(hang), timeout=0.2) as (server, backend):
        with pytest.raises(BackendTimeout, match=r"didn't answer within 0\.2 s"):
            await only(backend, ask("Hi"))

    assert len(server.requests) == 1 + 1


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    url = await refused_url()
    backend = OpenAIBackend(url, "guard")

    with pytest.raises(BackendUnavailable, match="can't be reached"):
        await backend.prepare()
    with pytest.raises(BackendUnavailable, match=url):
        await only(backend, ask("Hi"))
    assert (backend.supports_prefill, backend.supports_candidates) == (False, False)
    await backend.aclose()


async def test_a_host_without_a_name_server_entry_is_unavailable() -> None:
    backend = OpenAIBackend("http://nowhere.invalid/v1", "guard")
    with pytest.raises(BackendUnavailable, match=r"nowhere\.invalid/v1 can't be reached"):
        await only(backend, ask("Hi"))
    await backend.aclose()


# --- The key


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"RSAFE_API_KEY": KEY, "OPENAI_API_KEY": "other"}, KEY),
        ({"OPENAI_API_KEY": f" {KEY}\n"}, KEY),
        ({}, "none"),
    ],
)
async def test_the_key_comes_from_the_environment(
    variables: dict[str, str], sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    async with running(Chat()) as (server, backend):
        await backend.prepare()

    assert server.keys == {f"Bearer {sent}"}


async def test_the_variable_of_the_key_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    async with running(Chat(), api_key_env="MY_KEY") as (server, backend):
        await backend.prepare()

    assert server.keys == {f"Bearer {KEY}"}


async def test_the_key_and_the_content_are_in_no_log_and_no_representation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RSAFE_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    async with running(first(1, always(fault(500)))) as (_, backend):
        await only(backend, ask("hushhush"))

        assert KEY not in f"{backend} {backend!r} {vars(backend)} {backend._pools}"
    assert KEY not in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("key", ["schlüssel", "a\nb"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSAFE_API_KEY", key)
    with pytest.raises(SettingsError, match="The API key in RSAFE_API_KEY must be printable") as caught:
        OpenAIBackend("http://a/v1")
    assert key not in str(caught.value)


# --- Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": []}, "must name a server"),
        ({"base_url": ""}, "must be an address such as http://localhost:8000/v1, not ''"),
        ({"base_url": "localhost:8000/v1"}, "not 'localhost:8000/v1'"),
        ({"base_url": ["http://a/v1", "ftp://b"]}, "not 'ftp://b'"),
        ({"base_url": "http://a:99999/v1"}, "must be an address"),
        ({"base_url": "http://a/v1?key=b"}, "must be an address"),
        ({"base_url": f"http://me:{KEY}@a/v1"}, "must not hold a name or a password"),
        ({"timeout": 0}, "timeout must be a number of seconds over 0, not 0"),
        ({"timeout": math.inf}, "timeout must be"),
        ({"connect_timeout": -1.0}, "connect_timeout must be"),
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"queue": -1}, "queue must be at least 0, not -1"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env names NO_SUCH_KEY, and that variable isn't set"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        OpenAIBackend(**{"base_url": "http://a/v1", **settings})
    assert says in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_backend_string_names_servers_and_model() -> None:
    one = backend_from_string("openai:http://gpu:8000/v1#org/guard-7b")
    several = backend_from_string("openai:http://a/v1/,https://b/v1")

    assert isinstance(one, OpenAIBackend)
    assert (one._urls, one.model) == (["http://gpu:8000/v1"], "org/guard-7b")
    assert isinstance(several, OpenAIBackend)
    assert (several._urls, several.model) == (["http://a/v1", "https://b/v1"], "a")


@pytest.mark.parametrize("text", ["openai", "openai:", "openai:#guard", "openapi:http://a/v1", "llamacpp:"])
def test_a_backend_string_that_names_none_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"http://localhost:8000/v1|'openai:BASE_URL#MODEL'"):
        backend_from_string(text)


def test_the_sdk_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys; from rsafe_plugins.backends import backend_from_string as make;"
        "make('openai:http://a/v1#b'); sys.exit('openai' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_missing_package_is_said_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "rsafe-plugins\[openai\]"'):
        await OpenAIBackend("http://a/v1").prepare()


# --- The guard on such servers


@pytest.mark.parametrize(("reasoning", "score"), [("never", 0.3 / (0.6002 + 0.3)), ("always", 0.277)])
async def test_a_guard_scores_where_the_server_can(reasoning: Any, score: float) -> None:
    async with Server(Chat(reasoning_parser=True)) as server:
        backend = OpenAIBackend(server.url, "guard")
        verdict = await Guard(backend=backend, reasoning=reasoning).acheck("Hi")

        assert (verdict.label, verdict.error, verdict.model) == ("safe", None, "guard")
        assert verdict.score == pytest.approx(score, abs=0.001)
        assert verdict.reasoning == ("Harmless" if reasoning == "always" else None)
        await backend.aclose()


async def test_a_guard_generates_where_the_server_cannot_score() -> None:
    async def plain(server: Server, path: str, body: Json) -> Reply:
        if is_probe(body):
            return await Chat(prefill="never")(server, path, body)
        return await answers({"content": f"<think>Bad.</think>{BOX}unsafe}}"})(server, path, body)

    async with Server(plain) as server:
        backend = OpenAIBackend(server.url, "guard")
        verdict = await Guard(backend=backend).acheck("Hi")
        await backend.aclose()

    assert (verdict.label, verdict.score, verdict.reasoning) == ("unsafe", None, "Bad.")


async def test_a_guard_blocks_where_no_server_is() -> None:
    backend = OpenAIBackend(await refused_url(), "guard")
    verdict = await Guard(backend=backend).acheck("Hi")
    await backend.aclose()

    assert (verdict.label, verdict.blocked) == (None, True)
    assert "can't be reached" in str(verdict.error)


def several(*choices: dict[str, Any]) -> Behavior:
    return always(in_json({"choices": [{"finish_reason": "stop", **choice} for choice in choices]}))


async def test_of_several_answers_the_first_counts_wherever_it_stands() -> None:
    unsafe, safe = ({"index": n, "message": {"content": text}} for n, text in enumerate(("No.", "Yes.")))
    async with running(after_probe(several(safe, unsafe))) as (_, backend):
        assert (await only(backend, ask("Hi"))).text == "No."


@pytest.mark.parametrize("index", [{}, {"index": 0}, {"index": 1}])
async def test_of_several_answers_none_counts_that_cannot_be_told_from_the_others(
    index: dict[str, int],
) -> None:
    both = ({**index, "message": {"content": text}} for text in ("No.", "Yes."))
    async with running(after_probe(several(*both))) as (_, backend):
        with pytest.raises(BackendError, match="no answer of OpenAI's chat API"):
            await only(backend, ask("Hi"))


async def test_a_probe_that_hangs_holds_nobody_as_long_as_an_answer_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PROBE_SECONDS", 0.1)
    async with running(hang, timeout=600, connect_timeout=0.1) as (server, backend):
        with pytest.raises(BackendTimeout, match=r"within 0\.1 s"):
            await backend.prepare()
        server.release.set()
        await backend.prepare()
        assert backend.supports_candidates
