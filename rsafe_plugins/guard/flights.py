"""Identical work is done once: while it is under way, and for as long after as the user allows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cachetools import TTLCache

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_KEPT = 10_000


@dataclass(slots=True, eq=False)
class _Flight(Generic[Result]):
    """One batch under way, and how many callers wait for something in it."""

    task: asyncio.Task[dict[Hashable, Result]]
    items: Mapping[Hashable, Any]
    waiting: int = 0


class Flights(Generic[Item, Result]):
    """Runs batches of items and lets identical items share one result.

    A batch goes on as long as anybody waits for one of its results: a caller that is cancelled takes nothing
    from the others, and the last one that is cancelled cancels the work.

    Args:
        work: Gives the results of a batch of items, in order. What it raises, all who wait for it get.
        seconds: How long a result is kept; 0 keeps none. At most 10,000 are kept.
        keep: Whether a result may be kept.
        late: The result of an item that waited too many seconds for the item in another caller's batch.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Awaitable[list[Result]]],
        seconds: float,
        keep: Callable[[Result], bool],
        late: Callable[[Item, Item, float], Result],
    ) -> None:
        self._work = work
        self._keep = keep
        self._late = late
        self._kept: TTLCache[Hashable, Result] | None = TTLCache(MOST_KEPT, seconds) if seconds else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flying: dict[Hashable, _Flight[Result]] = {}

    async def results(
        self, items: Sequence[tuple[Hashable, Item]], seconds: float
    ) -> list[tuple[Result, bool]]:
        """For each item, under its key, the result and whether it was kept from before.

        Args:
            items: Keys and items.
            seconds: How long to wait for batches of other callers; one's own has the time that it takes.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a forked child starts anew
            self._loop, self._flying = loop, {}
        known = self._known({key for key, _ in items})
        missing = {key: item for key, item in items if key not in known and key not in self._flying}
        joined = {self._flying[key] for key, _ in items if key in self._flying and key not in known}
        own: _Flight[Result] | None = None
        if missing:
            own = _Flight(loop.create_task(self._fly(missing)), missing)
            self._flying.update(dict.fromkeys(missing, own))
        awaited = {key: self._flying[key] for key, _ in items if key not in known}
        await self._wait(own, joined, seconds)
        fresh = {
            key: awaited[key].task.result()[key]
            if awaited[key].task.done()
            else self._late(item, awaited[key].items[key], seconds)
            for key, item in items
            if key in awaited
        }
        return [(known[key], True) if key in known else (fresh[key], False) for key, _ in items]

    def _known(self, keys: Iterable[Hashable]) -> dict[Hashable, Result]:
        known: dict[Hashable, Result] = {}
        if self._kept is None:
            return known
        for key in keys:
            # Asked for once: what is kept may run out between two looks.
            with contextlib.suppress(KeyError):
                known[key] = self._kept[key]
        return known

    async def _fly(self, items: dict[Hashable, Item]) -> dict[Hashable, Result]:
        try:
            results = dict(zip(items, await self._work(list(items.values())), strict=True))
        finally:
            self._land(items, asyncio.current_task())
        if self._kept is not None:
            self._kept.update((key, result) for key, result in results.items() if self._keep(result))
        return results

    async def _wait(self, own: _Flight[Result] | None, joined: set[_Flight[Result]], seconds: float) -> None:
        flights = joined | ({own} if own else set())
        for flight in flights:
            flight.waiting += 1
        try:
            if joined:
                await asyncio.wait([flight.task for flight in joined], timeout=seconds)
            if own:
                await asyncio.wait([own.task])
        finally:
            for flight in flights:
                flight.waiting -= 1
                if not flight.waiting and not flight.task.done():
                    # Nobody joins what is being cancelled.
                    self._land([key for key in self._flying if self._flying[key] is flight], flight.task)
                    flight.task.cancel()

    def _land(self, keys: Iterable[Hashable], task: asyncio.Task[Any] | None) -> None:
        for key in keys:
            if key in self._flying and self._flying[key].task is task:
                del self._flying[key]
