"""One event loop in the background, on which all engine work runs, whoever asks for it.

Threads and event loops so share one engine; a sync method can be called where a loop is running already.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def _background() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _lock:
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_run, args=(_loop,), name="rsafe", daemon=True)
            _thread.start()
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            loop.run_forever()
        except (KeyboardInterrupt, SystemExit):
            # An engine's own task raised it, which ends the loop; the checks of everybody else go on.
            continue
        return


def _forget() -> None:
    """A forked child has the parent's loop but not its thread."""
    global _lock, _loop, _thread
    _lock, _loop, _thread = threading.Lock(), None, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    if threading.current_thread() is _thread:
        work.close()
        raise RuntimeError(
            "A guard's sync method was called from inside its own engine; use the async one there."
        )
    return asyncio.run_coroutine_threadsafe(work, _background())


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the background loop and waits; an interrupt cancels it."""
    future = _submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the background loop; cancelling the caller cancels it."""
    if threading.current_thread() is _thread:
        return await work
    return await asyncio.wrap_future(_submit(work))
