import asyncio
import threading

import pytest

from rsafe_plugins import BackendError, Content, Guard
from rsafe_plugins.backends import Request
from rsafe_plugins.testing import ScriptedBackend

SAFE = r"\boxed{safe}"


class Gate:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.started, self.cancelled = threading.Event(), threading.Event()
        self.backend = ScriptedBackend(self._reply)
        self.loop: asyncio.AbstractEventLoop | None = None

    async def _reply(self, request: Request) -> str:
        self.loop = asyncio.get_running_loop()
        self.started.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return SAFE

    def release(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.open.set)


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 5)


async def test_the_same_content_checked_at_once_is_judged_once() -> None:
    gate = Gate()
    guard = Guard(backend=gate.backend)
    tasks = [asyncio.create_task(guard.acheck("x")) for _ in range(50)]
    await reached(gate.started)
    gate.release()
    assert {verdict.label for verdict in await asyncio.gather(*tasks)} == {"safe"}
    assert len(gate.backend.requests) == 1


def test_the_same_content_twice_in_a_list_is_judged_once_and_answered_twice() -> None:
    backend = ScriptedBackend(SAFE)
    assert len(Guard(backend=backend).check_many(["x", "y", "x"])) == 3
    assert len(backend.requests) == 2


def test_contents_that_differ_only_in_what_surrounds_them_are_judged_apart() -> None:
    backend = ScriptedBackend(SAFE)
    Guard(backend=backend).check_many(
        ["x", Content.prompt("x", [("user", "earlier")]), Content.response("x"), Content.response("x", "q")]
    )
    assert len(backend.requests) == 4


async def test_a_caller_that_is_cancelled_takes_nothing_from_the_others() -> None:
    gate = Gate()
    guard = Guard(backend=gate.backend)
    first = asyncio.create_task(guard.acheck("x"))
    await reached(gate.started)
    second = asyncio.create_task(guard.acheck("x"))
    assert (await guard.acheck_many([])) == []  # by then the second waits too
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.release()
    assert (await second).label == "safe"
    assert not gate.cancelled.is_set()


async def test_the_last_caller_that_is_cancelled_cancels_the_work_and_a_new_one_starts_afresh() -> None:
    gate = Gate()
    guard = Guard(backend=gate.backend)
    tasks = [asyncio.create_task(guard.acheck("x")) for _ in range(3)]
    await reached(gate.started)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await reached(gate.cancelled)
    gate.release()
    assert (await guard.acheck("x")).label == "safe"


def test_nothing_is_kept_unless_the_user_says_so() -> None:
    backend = ScriptedBackend(SAFE)
    guard = Guard(backend=backend)
    guard.check("x")
    guard.check("x")
    assert len(backend.requests) == 2


def test_a_kept_verdict_costs_no_tokens() -> None:
    backend = ScriptedBackend(SAFE)
    guard = Guard(backend=backend, cache=60)
    first, second = guard.check("x"), guard.check("x")
    assert len(backend.requests) == 1
    assert (first.label, second.label) == ("safe", "safe")
    assert (first.usage.completion_tokens > 0, second.usage.completion_tokens) == (True, 0)


def test_a_failure_is_never_kept() -> None:
    backend = ScriptedBackend([BackendError("down"), SAFE])
    guard = Guard(backend=backend, cache=60)
    assert [guard.check("x").label, guard.check("x").label] == [None, "safe"]


def test_a_verdict_is_kept_no_longer_than_the_user_said() -> None:
    backend = ScriptedBackend(SAFE)
    guard = Guard(backend=backend, cache=1e-6)
    guard.check("x")
    guard.check("x")
    assert len(backend.requests) == 2


def test_a_verdict_that_runs_out_between_two_looks_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ScriptedBackend(SAFE)
    guard = Guard(backend=backend, cache=60)
    guard.check("x")
    kept = guard._flights._kept
    assert kept is not None
    monkeypatch.setattr(type(kept), "__contains__", lambda self, key: True)
    kept.clear()
    assert guard.check("x").label == "safe"
    assert len(backend.requests) == 2


def test_what_is_kept_holds_nothing_of_what_was_judged() -> None:
    guard = Guard(backend=ScriptedBackend(SAFE), cache=60)
    guard.check("SECRET")
    kept = guard._flights._kept
    assert kept
    assert "SECRET" not in repr(dict(kept))


def test_two_guards_do_not_share_verdicts() -> None:
    backend = ScriptedBackend(SAFE)
    Guard(backend=backend, cache=60).check("x")
    Guard("mlcommons", backend=backend, cache=60).check("x")
    assert len(backend.requests) == 2
