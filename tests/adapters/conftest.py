"""What all adapters are tested with: an engine that finds one word unsafe, and engines that fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from rsafe_plugins.backends import Completion, Request
from rsafe_plugins.errors import BackendError
from rsafe_plugins.testing import ScriptedBackend

ATTACK = "zqxattack"
UNSAFE = "\\boxed{unsafe}\nCategories: U2"
SAFE = "\\boxed{safe}"


class ShortBackend(ScriptedBackend):
    """Leaves out the last request's answer."""

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        return (await super().complete(requests))[:-1]


class HangingBackend(ScriptedBackend):
    """Never answers; tells when it was asked and when it was let go."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.released = threading.Event()

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.released.set()
        raise AssertionError("unreachable")


@pytest.fixture
def attack() -> str:
    """The word that the engine finds unsafe."""
    return ATTACK


@pytest.fixture
def engine() -> ScriptedBackend:
    return ScriptedBackend(lambda request: UNSAFE if ATTACK in request.messages[-1].content else SAFE)


@pytest.fixture
def hanging() -> HangingBackend:
    return HangingBackend()


@pytest.fixture(params=["hangs", "answers with an error", "crashes", "answers garbage", "answers too few"])
def failing(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a guard whose engine fails on content that it would else find safe."""
    match request.param:
        case "hangs":
            return {"backend": HangingBackend(), "timeout": 0.05}
        case "answers with an error":
            return {"backend": ScriptedBackend(BackendError("The engine is out of order."))}
        case "crashes":
            return {"backend": ScriptedBackend(RuntimeError(ATTACK))}
        case "answers garbage":
            return {"backend": ScriptedBackend("That looks safe to me!")}
        case _:
            return {"backend": ShortBackend(SAFE)}
