"""Requests of checks that run at the same time, put together into one call of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsafe_plugins.backends import Completion, Request
from rsafe_plugins.errors import BackendError

_QUIET = 0.012  # seconds without another request, after which those that wait go
_LONGEST = 0.08  # seconds that one waits for others at most

Answer = Completion | BackendError
Send = Callable[[Sequence[Request]], Coroutine[Any, Any, Sequence[Answer]]]


@dataclass(slots=True, eq=False)
class _Group:
    """Requests that cost an engine alike, so that none waits long for another's end."""

    waiting: list[tuple[Request, asyncio.Future[Answer]]] = field(default_factory=list)
    departure: asyncio.Task[None] | None = None
    under_way: int = 0
    last_caller: int = 0
    last_arrival: float = 0.0
    last_end: float = 0.0


class Joiner:
    """Joins single requests of callers that run at the same time.

    A caller that is alone waits for nobody. One that came while another's request was under way waits until no
    more come, 80 ms at most. A caller that is cancelled takes nothing from the others; when all of a call are,
    the call is.

    Args:
        send: Calls the engine; gives a result for each request, in order, and raises nothing.
        most: Requests in one call, at most: more would wait for each other in the engine.
    """

    def __init__(self, send: Send, most: int = 64) -> None:
        self._send = send
        self._most = most
        self._loop: asyncio.AbstractEventLoop | None = None
        self._groups: dict[Hashable, _Group] = {}
        self._calls: set[asyncio.Task[Any]] = set()  # so that none is collected before its end

    async def complete(self, request: Request, caller: int) -> Answer:
        """The engine's answer to one request.

        Args:
            request: The request.
            caller: Stands for who asks; whoever asks one thing after the other is the same caller.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a forked child starts anew
            self._loop, self._groups, self._calls = loop, {}, set()
        group = self._groups.setdefault((bool(request.candidates), request.max_tokens), _Group())
        answer: asyncio.Future[Answer] = loop.create_future()
        group.waiting.append((request, answer))
        group.last_arrival = time.monotonic()
        if group.departure is None or group.departure.done():
            is_another = caller != group.last_caller and group.last_arrival - group.last_end < _QUIET
            has_company = group.under_way > 0 or is_another
            group.departure = loop.create_task(self._depart(group, _LONGEST if has_company else 0.0))
        group.last_caller = caller
        return await answer

    async def _depart(self, group: _Group, longest: float) -> None:
        started = time.monotonic()
        await asyncio.sleep(0)  # those that arrived in the same instant come along
        while longest:
            now = time.monotonic()
            ready = min(group.last_arrival + _QUIET, started + longest)
            if now >= ready:
                break
            await asyncio.sleep(ready - now)
        going = [(request, answer) for request, answer in group.waiting if not answer.done()]
        group.waiting, group.departure = [], None
        for first in range(0, len(going), self._most):
            self._go(group, going[first : first + self._most])

    def _go(self, group: _Group, going: list[tuple[Request, asyncio.Future[Answer]]]) -> None:
        group.under_way += 1
        self._calls.add(call := asyncio.create_task(self._send([request for request, _ in going])))
        left = len(going)

        def leave(_: asyncio.Future[Answer]) -> None:
            nonlocal left
            left -= 1
            if not left:
                call.cancel()

        def arrive(call: asyncio.Task[Sequence[Answer]]) -> None:
            self._calls.discard(call)
            group.under_way -= 1
            group.last_end = time.monotonic()
            for number, (_, answer) in enumerate(going):
                answer.remove_done_callback(leave)
                if answer.done():
                    continue
                if call.cancelled():
                    answer.cancel()
                elif error := call.exception():
                    answer.set_exception(error)
                else:
                    answer.set_result(call.result()[number])

        for _, answer in going:
            answer.add_done_callback(leave)
        call.add_done_callback(arrive)
