from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsafe_plugins import BackendError, Guard
from rsafe_plugins.backends import Completion, Request
from rsafe_plugins.guard.joiner import Joiner
from rsafe_plugins.testing import ScriptedBackend

SAFE, UNSAFE = r"\boxed{safe}", r"\boxed{unsafe}"


class Held(ScriptedBackend):
    """An engine whose first call ends when it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda request: UNSAFE if "BAD" in request.messages[-1].content else SAFE)
        self.gate: asyncio.Event | None = None
        self.started, self.cancelled = threading.Event(), threading.Event()

    async def complete(self, requests):  # type: ignore[no-untyped-def]
        if self.gate is None:
            self.gate, self.loop = asyncio.Event(), asyncio.get_running_loop()
            self.started.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return await super().complete(requests)

    def release(self) -> None:
        assert self.gate is not None
        self.loop.call_soon_threadsafe(self.gate.set)


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 5)


async def test_fifty_checks_at_once_are_a_few_calls_and_each_gets_its_own_verdict() -> None:
    backend = ScriptedBackend(lambda request: UNSAFE if "BAD" in request.messages[-1].content else SAFE)
    guard = Guard(backend=backend)
    texts = [f"{'BAD' if number % 3 == 0 else 'fine'} {number}" for number in range(50)]
    verdicts = await asyncio.gather(*map(guard.acheck, texts))
    assert [verdict.label == "unsafe" for verdict in verdicts] == ["BAD" in text for text in texts]
    assert len(backend.requests) == 50
    assert len(backend.calls) <= 3


def test_threads_are_joined_as_well() -> None:
    backend = ScriptedBackend(SAFE)
    guard = Guard(backend=backend)
    barrier = threading.Barrier(16)

    def check(number: int) -> str | None:
        barrier.wait()
        return guard.check(f"hello {number}").label

    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(check, range(16))) == {"safe"}
    assert len(backend.requests) == 16
    assert len(backend.calls) < 16


def test_an_engine_that_joins_callers_itself_is_asked_by_each() -> None:
    backend = ScriptedBackend(SAFE)
    backend.joins_callers = True
    guard = Guard(backend=backend)

    async def all_of_them() -> None:
        await asyncio.gather(*(guard.acheck(f"hello {number}") for number in range(20)))

    asyncio.run(all_of_them())
    assert len(backend.calls) == 20


async def test_a_list_goes_by_itself() -> None:
    backend = Held()
    guard = Guard(backend=backend)
    first = asyncio.create_task(guard.acheck("first"))
    await reached(backend.started)
    some = await guard.acheck_many([f"list {number}" for number in range(5)])
    assert [verdict.label for verdict in some] == ["safe"] * 5
    assert [len(call) for call in backend.calls] == [5]
    backend.release()
    assert (await first).label == "safe"


async def test_requests_of_different_cost_do_not_wait_for_each_other() -> None:
    thought = asyncio.Event()

    async def send(requests: Sequence[Request]) -> list[Completion]:
        if requests[0].max_tokens > 100:
            await thought.wait()
        return [Completion(text="done") for _ in requests]

    joiner = Joiner(send)
    slow = asyncio.create_task(joiner.complete(Request(messages=(), max_tokens=512), 1))
    assert await joiner.complete(Request(messages=(), max_tokens=8), 2) == Completion(text="done")
    assert not slow.done()
    thought.set()
    assert await slow == Completion(text="done")


async def test_a_caller_that_is_cancelled_takes_nothing_from_those_it_was_joined_with() -> None:
    backend = Held()
    guard = Guard(backend=backend)
    tasks = [asyncio.create_task(guard.acheck(f"hello {number}")) for number in range(10)]
    await reached(backend.started)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    backend.release()
    assert {verdict.label for verdict in await asyncio.gather(*tasks[1:])} == {"safe"}
    assert not backend.cancelled.is_set()


async def test_the_engine_is_cancelled_with_the_last_caller() -> None:
    backend = Held()
    guard = Guard(backend=backend)
    tasks = [asyncio.create_task(guard.acheck(f"hello {number}")) for number in range(10)]
    await reached(backend.started)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await reached(backend.cancelled)
    assert (await guard.acheck("afterwards")).label == "safe"


@pytest.mark.parametrize(
    "fault", [BackendError("down"), RuntimeError("bug"), SystemExit(1), asyncio.CancelledError()]
)
async def test_a_call_that_fails_blocks_all_that_were_joined(fault: BaseException) -> None:
    guard = Guard(backend=ScriptedBackend(fault))
    verdicts = await asyncio.gather(*(guard.acheck(f"hello {number}") for number in range(20)))
    assert all(verdict.blocked and verdict.label is None for verdict in verdicts)


async def test_a_call_that_hangs_times_out_for_each() -> None:
    dropped = threading.Event()

    async def hang(request: Request) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            dropped.set()
        return SAFE

    guard = Guard(backend=ScriptedBackend(hang), timeout=0.2)
    verdicts = await asyncio.gather(*(guard.acheck(f"hello {number}") for number in range(20)))
    assert all(verdict.blocked and "0.2 s" in str(verdict.error) for verdict in verdicts)
    assert dropped.is_set()


async def test_a_departure_that_somebody_cancels_does_not_strand_those_who_come_later() -> None:
    async def send(requests: Sequence[Request]) -> list[Completion]:
        return [Completion(text="done") for _ in requests]

    joiner = Joiner(send)
    first = asyncio.create_task(joiner.complete(Request(messages=()), 1))
    await asyncio.sleep(0)
    (group,) = joiner._groups.values()
    assert group.departure is not None
    group.departure.cancel()
    await asyncio.sleep(0)
    assert await joiner.complete(Request(messages=()), 2) == Completion(text="done")
    assert await first == Completion(text="done")


async def test_a_call_holds_no_more_than_the_engine_works_on_at_once() -> None:
    backend = ScriptedBackend(SAFE)
    backend.concurrency = 4
    guard = Guard(backend=backend)
    await asyncio.gather(*(guard.acheck(f"hello {number}") for number in range(20)))
    assert len(backend.requests) == 20
    assert max(map(len, backend.calls)) <= 4
