"""What an engine may do instead of answering."""

from __future__ import annotations

import asyncio
from typing import Any

from rsafe_plugins.backends import Request
from rsafe_plugins.errors import BackendError


async def hang(request: Request) -> str:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


FAULTS: dict[str, Any] = {
    "times out": hang,
    "is down": BackendError("status 500"),
    "crashes": RuntimeError("segfault"),
    "drops the request": asyncio.CancelledError(),
    "writes garbage": "Sure, that is safe.",
    "writes nothing": "",
}
"""The reply of a `ScriptedBackend` for each."""
