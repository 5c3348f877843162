"""vLLM in this process, or rather beside it: vLLM runs its engine in processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rsafe_plugins.backends.base import Backend, Completion, Request, Usage, check_at_least_one
from rsafe_plugins.backends.encoding import Encoded, encode
from rsafe_plugins.backends.tokens import Tokens, walk_candidates
from rsafe_plugins.errors import BackendError, BackendUnavailable

T = TypeVar("T")

_NEGLIGIBLE = 0.02

_MISSING = (
    'vLLM isn\'t installed here: pip install "rsafe-plugins[vllm]", in an environment of its own. Or serve the model '
    "with vLLM elsewhere, and use backend='openai:http://HOST:8000/v1'."
)


class VLLMBackend(Backend):
    """A causal language model run by vLLM's `AsyncLLM`, with its prefix cache and its continuous batching.

    Text is generated greedily. The engine starts at the first request, or with `start`, and takes about a minute.
    vLLM starts processes: a script that uses this must be importable, with an `if __name__ == "__main__":`.

    Args:
        model: A Hugging Face name or a model's folder. It must have a chat template.
        adapter: Folder of a PEFT adapter (LoRA) for it.
        context: Tokens that prompt and answer may have together (>= 1). None means all that the model allows.
        tensor_parallel: GPUs that the model is spread over (>= 1).
        concurrency: Requests given to vLLM at once (>= 1); it batches them as it sees fit.
        engine: Any other of vLLM's engine arguments, such as `dtype`, `quantization` or `gpu_memory_utilization`.

    Raises:
        SettingsError: A number is too small.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=VLLMBackend("Qwen/Qwen2.5-7B-Instruct", adapter="my-adapter", tensor_parallel=2))
    """

    joins_callers = True

    def __init__(
        self,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        context: int | None = None,
        tensor_parallel: int = 1,
        concurrency: int = 256,
        **engine: Any,
    ) -> None:
        check_at_least_one(context=context, tensor_parallel=tensor_parallel, concurrency=concurrency)
        self._model, self._adapter = str(model), adapter
        self.model = Path(model).name if Path(model).exists() else str(model)
        if adapter is not None:
            self.model += f"+{Path(adapter).name}"
        self.concurrency = concurrency
        self._arguments: dict[str, Any] = {
            "model": self._model,
            "max_model_len": context,
            "tensor_parallel_size": tensor_parallel,
            "enable_prefix_caching": True,
            "enable_lora": adapter is not None,
            "disable_log_stats": True,
            **engine,
        }
        self._lock = threading.Lock()
        self._running: _Running | None = None

    async def start(self) -> None:
        """Starts vLLM now instead of at the first request.

        Raises:
            BackendUnavailable: It can't be started; a later call tries again.
        """
        await self._started()

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers each request, in order.

        A candidate's log-probability is exact: the sum over all its tokens, right after the prefill. That of a
        candidate whose first token is less than a fiftieth as likely as another candidate's is an upper bound.

        Raises:
            BackendUnavailable: vLLM can't be started, or the backend was closed.
        """
        running = await self._started()
        return list(await asyncio.gather(*(running.answer(request) for request in requests)))

    async def aclose(self) -> None:
        """Ends vLLM and its processes; requests under way end with `BackendUnavailable`."""
        with self._lock:
            self.closed = True
            running, self._running = self._running, None
        if running is not None:
            await asyncio.to_thread(running.stop)

    async def _started(self) -> _Running:
        with self._lock:
            if self.closed:
                raise _closed()
            before = self._running
            if before is not None and before.pid != os.getpid():
                raise BackendUnavailable(
                    "This VLLMBackend was started before its process was forked, and its thread doesn't survive that: "
                    "make a new one in the child."
                )
            if before is None or before.is_broken:
                self._running = _Running(self._arguments, self._adapter, self.concurrency)
            running = self._running
        assert running is not None
        if before is not None and before is not running:
            await asyncio.to_thread(before.stop)
        await running.wait_until_ready()
        return running


class _Running:
    """An engine and the event loop that it belongs to, in a thread of its own: callers may have any loop."""

    def __init__(self, arguments: Mapping[str, Any], adapter: str | Path | None, concurrency: int) -> None:
        self._arguments, self._adapter = arguments, adapter
        self.pid = os.getpid()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopped = False
        self._engine: Any = None
        self._tokenizer: Any = None
        self._context = 0
        self._lora: Any = None
        self._places = asyncio.Semaphore(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rsafe-vllm", daemon=True)
        self._thread.start()
        self.ready = asyncio.run_coroutine_threadsafe(self._load(), self._loop)
        self.ready.add_done_callback(self._give_up)

    @property
    def is_broken(self) -> bool:
        """Whether the engine couldn't be started, or died."""
        if not self.ready.done():
            return False
        failed = self.ready.cancelled() or self.ready.exception() is not None
        return failed or bool(self._engine.errored)

    async def answer(self, request: Request) -> Completion | BackendError:
        """What the engine answers; awaited on any loop, and dropped in the engine when cancelled."""
        with self._lock:
            if self._stopped:
                return _closed()
            answer = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
        try:
            return await self._result(asyncio.wrap_future(answer))
        except BackendUnavailable as error:
            return error

    async def wait_until_ready(self) -> None:
        """Returns once the engine has started.

        Raises:
            BackendUnavailable: It can't be started, or was stopped meanwhile.
        """
        # Others wait for it too, so that one caller's cancellation must not reach it.
        await self._result(asyncio.shield(asyncio.wrap_future(self.ready)))

    async def _result(self, future: asyncio.Future[T]) -> T:
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped and task is not None and not task.cancelling():
                raise _closed() from None
            raise

    def stop(self) -> None:
        """Ends the engine, its processes and the thread; does nothing in a forked child."""
        if self.pid == os.getpid():
            self._end_loop()
            self._thread.join()

    def _give_up(self, ready: Future[None]) -> None:
        """Ends the thread of an engine that couldn't be started."""
        if ready.cancelled() or ready.exception() is not None:
            self._end_loop()

    def _end_loop(self) -> None:
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        while True:
            # An engine's own task may exit, which ends the loop; the requests of everybody else go on.
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self._loop.run_forever()
            if self._stopped:
                break
        try:
            self._shut_down()
            while tasks := asyncio.all_tasks(self._loop):
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            # What ended in the loop's last turn was no task any more, but who asked for it isn't told yet.
            self._loop.run_until_complete(asyncio.sleep(0))
        finally:
            self._loop.close()

    def _shut_down(self) -> None:
        if self._engine is not None:
            with contextlib.suppress(Exception):
                self._engine.shutdown()

    async def _load(self) -> None:
        try:
            self._make_engine()
        except BaseException as error:
            self._shut_down()
            if isinstance(error, BackendError | asyncio.CancelledError):
                raise
            if isinstance(error, ImportError):
                raise BackendUnavailable(_MISSING) from error
            if isinstance(error, TypeError):
                raise BackendUnavailable(
                    f"vLLM refuses an engine argument ({_first_line(error)})."
                ) from error
            raise BackendUnavailable(
                f"vLLM can't start with {self._arguments['model']} ({type(error).__name__}: {_first_line(error)})."
            ) from error

    def _make_engine(self) -> None:
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))
        self._tokenizer = self._engine.get_tokenizer()
        self._context = int(self._engine.model_config.max_model_len)
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise BackendUnavailable(
                f"{self._arguments['model']} comes without a chat template, so it can't be asked as a chat: use an "
                "instruction-tuned model, or set chat_template in its tokenizer_config.json."
            )
        if self._adapter is not None:
            self._lora = LoRARequest("rsafe", 1, str(self._adapter))

    async def _answer(self, request: Request) -> Completion | BackendError:
        try:
            if self._stopped:
                return _closed()
            async with self._places:
                encoded = encode(self._tokenizer, request, self._context)
                return await (self._score(encoded) if request.candidates else self._generate(encoded))
        except BackendError as error:
            return _closed() if self._stopped else error
        except asyncio.CancelledError:
            if self._stopped:
                return _closed()
            raise
        except BaseException as error:
            if self._stopped:
                return _closed()
            # The engine's own message may quote what it was asked, so only its kind is passed on, and no cause.
            if self._engine.errored:
                return BackendUnavailable("vLLM's engine died; the next request starts it anew.")
            return BackendError(f"vLLM failed with {type(error).__name__}.")

    async def _generate(self, encoded: Encoded) -> Completion:
        request = encoded.request
        output = await self._ask(encoded.tokens, max_tokens=request.max_tokens, stop=list(request.stop))
        (answer,) = output.outputs
        return Completion(
            text=answer.text,
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            usage=_usage(output, len(answer.token_ids)),
        )

    async def _score(self, encoded: Encoded) -> Completion:
        is_exact = encoded.request.exact
        steps = sorted({token for tail in encoded.tails.values() for token in tail})
        # What may be a bound is known exactly along the greedy answer, which costs no further request.
        ahead = 1 if is_exact else max(map(len, encoded.tails.values()))
        first = await self._ask(encoded.tokens, max_tokens=ahead, logprob_token_ids=steps)
        (answer,) = first.outputs
        drawn = tuple(answer.token_ids)
        known = {drawn[:place]: found for place, found in enumerate(answer.logprobs)}

        async def next_tokens(path: Tokens, steps: set[int]) -> tuple[Mapping[int, float], float]:
            if (found := known.get(path)) is None:
                more = await self._ask(encoded.tokens + path, max_tokens=1, logprob_token_ids=sorted(steps))
                (found,) = more.outputs[0].logprobs
            return {step: min(found[step].logprob, 0.0) for step in steps}, 0.0

        def may_follow(path: Tokens) -> bool:
            if is_exact or path in known:
                return True
            bounded.update(name for name, tail in encoded.tails.items() if tail[: len(path)] == path)
            return False

        bounded: set[str] = set()
        logprobs = await walk_candidates(encoded.tails, next_tokens, _NEGLIGIBLE, may_follow)
        return Completion(
            finish_reason="candidates",
            logprobs=MappingProxyType(logprobs),
            bounded=frozenset(bounded),
            usage=_usage(first, 0),
        )

    async def _ask(self, tokens: Tokens, **sampling: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(temperature=0, output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        outputs = self._engine.generate(
            {"prompt_token_ids": list(tokens)},
            parameters,
            request_id=f"rsafe-{next(self._numbers)}",
            lora_request=self._lora,
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if output.finished and output.outputs[0].finish_reason in ("stop", "length"):
                    return output
        raise BackendError("vLLM ended a request without an answer.")


def _usage(output: Any, generated: int) -> Usage:
    return Usage(len(output.prompt_token_ids), output.num_cached_tokens or 0, generated)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message").rstrip(".")


def _closed() -> BackendUnavailable:
    return BackendUnavailable("vLLM was closed: make a new VLLMBackend.")
