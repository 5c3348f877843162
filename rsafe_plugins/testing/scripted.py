"""A backend whose answers are written down beforehand, for tests."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rsafe_plugins.backends.base import Backend, Completion, Request, Usage
from rsafe_plugins.errors import BackendError

Answer = str | Completion | BaseException
"""The text of a completion, a whole one, or an error: a `BackendError` is the answer to its request, any
other exception is raised, as a broken engine would."""

Reply = Answer | Sequence[Answer] | Callable[[Request], Answer | Awaitable[Answer]]


class ScriptedBackend(Backend):
    r"""Answers requests from a script instead of an engine; remembers what it was asked.

    Args:
        reply: The answer to every request; or a list, one answer a request in the order they come (running
            out of answers is an error); or a function of the request, plain or async.
        candidates: Makes the backend one that scores: the probability of each candidate, or a function of
            the request that returns them. Without it `supports_candidates` is False.
        model: The model's name in verdicts.

    Attributes:
        calls: One entry for each call of `complete`: the requests it was given.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=ScriptedBackend(r"\boxed{unsafe}")).check("hello").blocked
        True
    """

    def __init__(
        self,
        reply: Reply = "",
        *,
        candidates: Mapping[str, float] | Callable[[Request], Mapping[str, float]] | None = None,
        model: str = "scripted",
    ) -> None:
        self.model = model
        self.supports_candidates = candidates is not None
        self.supports_prefill = candidates is not None
        self.calls: list[tuple[Request, ...]] = []
        self._candidates = candidates
        self._reply = reply
        self._position = 0

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in order."""
        return [request for call in self.calls for request in call]

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers from the script."""
        self.calls.append(tuple(requests))
        return [await self._answer(request) for request in requests]

    async def _answer(self, request: Request) -> Completion | BackendError:
        if request.candidates and self._candidates is not None:
            return self._score(request)
        answer = await self._next(request)
        if isinstance(answer, BackendError):
            return answer
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Completion):
            return answer
        return Completion(text=answer, usage=Usage(completion_tokens=len(answer.split())))

    async def _next(self, request: Request) -> Answer:
        reply = self._reply
        if isinstance(reply, str | Completion | BaseException):
            return reply
        if callable(reply):
            answer = reply(request)
            return await answer if inspect.isawaitable(answer) else answer
        if self._position >= len(reply):
            return BackendError(f"ScriptedBackend was given {len(reply)} replies and asked for one more.")
        self._position += 1
        return reply[self._position - 1]

    def _score(self, request: Request) -> Completion:
        scored = self._candidates(request) if callable(self._candidates) else self._candidates
        assert scored is not None
        logprobs = {name: math.log(max(scored.get(name, 0.0), 1e-12)) for name in request.candidates}
        return Completion(finish_reason="candidates", logprobs=logprobs)
