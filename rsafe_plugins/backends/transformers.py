"""Any causal language model that transformers can load, run by torch in this process, on a CPU or on GPUs."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rsafe_plugins.backends.base import Backend, Completion, Request, check_at_least_one
from rsafe_plugins.errors import BackendError, BackendUnavailable, SettingsError

if TYPE_CHECKING:
    from rsafe_plugins.backends.causal_lm import CausalLM
    from rsafe_plugins.backends.encoding import Encoded

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on its way through the worker thread. Cancelling the future is how its caller drops it."""

    request: Request
    answer: Future[Completion | BackendError] = field(default_factory=Future)

    def finish(self, answer: Completion | BackendError) -> None:
        if not self.answer.done() and self.answer.set_running_or_notify_cancel():
            self.answer.set_result(answer)


class TransformersBackend(Backend):
    """A causal language model that transformers loads, run by torch in this process.

    All work is done in one thread of its own. Requests that come while it is busy are gathered into batches of
    like length. What several chats begin with, such as a policy, is computed once and kept. Text is generated
    greedily. The model starts to load at the first request, or with `start`.

    Args:
        model: A Hugging Face name, a model's folder, or a GGUF file. It must have a chat template. Code that
            comes with a model is never run.
        adapter: Folder or Hugging Face name of a PEFT adapter (LoRA) for it.
        device: `cpu`, `cuda`, `cuda:1` and the like, or `auto` to spread the model over all GPUs. None means a
            GPU where there is one.
        dtype: `float32`, `bfloat16` or `float16`. None means float32 on a CPU, and elsewhere what the weights
            are stored in.
        context: Tokens that prompt and answer may have together (>= 1). None means all that the model allows.
        batch_size: Requests worked on at once (>= 1). More is faster and takes more memory.

    Raises:
        SettingsError: A setting can't be used.

    Example:
        >>> from rsafe_plugins import Guard
        >>> Guard(backend=TransformersBackend("Qwen/Qwen2.5-1.5B-Instruct", adapter="my-adapter"))
    """

    joins_callers = True

    def __init__(
        self,
        model: str | Path,
        *,
        adapter: str | Path | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        context: int | None = None,
        batch_size: int = 16,
    ) -> None:
        check_at_least_one(context=context, batch_size=batch_size)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}.")
        self._model, self._adapter = model, adapter
        self._device, self._dtype, self._context = device, dtype, context
        self.model = _short_name(model)
        if adapter is not None:
            self.model += f"+{_short_name(adapter)}"
        self.concurrency = batch_size
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._inbox: list[_Job] = []
        self._is_working = False
        self._loading: Future[None] | None = None
        self._engine: CausalLM | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rsafe-transformers")

    async def start(self) -> None:
        """Loads the model now instead of at the first request.

        Raises:
            BackendUnavailable: It can't be loaded; a later call tries again.
        """
        if self._loading is not None and os.getpid() != self._pid:
            raise BackendUnavailable(
                "This TransformersBackend was started before its process was forked, and its thread doesn't "
                "survive that: make a new one in the child."
            )
        with self._lock:
            if self.closed:
                raise _closed()
            if self._loading is None or (self._loading.done() and self._loading.exception() is not None):
                self._loading, self._pid = self._worker.submit(self._load), os.getpid()
            loading = self._loading
        # Others wait for it too, so that one caller's cancellation must not reach it.
        await asyncio.shield(asyncio.wrap_future(loading))

    async def complete(self, requests: Sequence[Request]) -> list[Completion | BackendError]:
        """Answers each request, in order.

        A candidate's log-probability is exact: the sum over all its tokens, right after the prefill.

        Raises:
            BackendUnavailable: The model can't be loaded, or the backend was closed.
        """
        await self.start()
        jobs = [_Job(request) for request in requests]
        self._submit(jobs)
        return list(await asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs)))

    async def aclose(self) -> None:
        """Frees the model and its memory; requests under way end with `BackendUnavailable`."""
        with self._lock:
            self.closed = True
        await asyncio.to_thread(self._worker.shutdown)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.free()

    def _load(self) -> None:
        try:
            from rsafe_plugins.backends.causal_lm import CausalLM, load
        except ImportError as error:
            raise BackendUnavailable(
                f'The transformers engine needs {error.name}: pip install "rsafe-plugins[transformers]".'
            ) from error
        loaded = load(
            _findable(self._model, "model"),
            adapter=_findable(self._adapter, "adapter") if self._adapter is not None else None,
            device=self._device,
            dtype=self._dtype,
        )
        self._engine = CausalLM(loaded, context=self._context)

    def _submit(self, jobs: Sequence[_Job]) -> None:
        with self._lock:
            if self.closed:
                raise _closed()
            self._inbox += jobs
            if not self._is_working:
                self._is_working = True
                self._worker.submit(self._work)

    def _work(self) -> None:
        """Answers all there is to answer; in the worker thread."""
        new: list[_Job] | None = []
        jobs: list[tuple[_Job, Encoded]] = []
        try:
            while (new := self._new_jobs(is_last_look=not jobs)) is not None:
                jobs += self._encoded(new)
                jobs = [(job, encoded) for job, encoded in jobs if not job.answer.cancelled()]
                if jobs:
                    self._answer_some(jobs)
        except BaseException as error:
            # Nobody may be left waiting, whatever broke.
            failure = error if isinstance(error, BackendUnavailable) else _failure(error)
            with self._lock:
                left, self._inbox, self._is_working = self._inbox, [], False
            for job in [*left, *(new or []), *(job for job, _ in jobs)]:
                job.finish(failure)
            raise

    def _new_jobs(self, *, is_last_look: bool) -> list[_Job] | None:
        with self._lock:
            if self.closed:
                raise _closed()
            new, self._inbox = self._inbox, []
            if is_last_look and not new:
                self._is_working = False
                return None
            return new

    def _encoded(self, jobs: Sequence[_Job]) -> list[tuple[_Job, Encoded]]:
        assert self._engine is not None
        encoded = []
        for job in jobs:
            try:
                encoded.append((job, self._engine.encode(job.request)))
            except BackendError as error:
                job.finish(error)
            except Exception as error:
                job.finish(_failure(error))
        return encoded

    def _answer_some(self, jobs: list[tuple[_Job, Encoded]]) -> None:
        """Answers one batch of the jobs and takes it from them."""
        assert self._engine is not None
        picked, shared = self._engine.plan([encoded for _, encoded in jobs], self.concurrency)
        batch = [jobs[index] for index in picked]

        def is_wanted(index: int) -> bool:
            return not self.closed and not batch[index][0].answer.cancelled()

        answers: list[Completion | BackendError]
        try:
            answers = self._engine.answer([encoded for _, encoded in batch], shared, is_wanted)
        except Exception as error:
            answers = [_failure(error)] * len(batch)
        for index in reversed(picked):
            del jobs[index]
        for (job, _), answer in zip(batch, answers, strict=True):
            job.finish(_closed() if self.closed else answer)


def _short_name(model: str | Path) -> str:
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return path.stem
    return path.resolve().name if isinstance(model, Path) or path.exists() else str(model)


def _findable(model: str | Path, what: str) -> str:
    """What transformers can be asked for."""
    path = Path(model).expanduser()
    if path.exists():
        return str(path)
    if isinstance(model, str) and not model.lower().endswith(".gguf") and _HUB_NAME.fullmatch(model):
        return model
    raise BackendUnavailable(
        f"{what} must be a folder, a Hugging Face name{' or a GGUF file' if what == 'model' else ''}, and there is "
        f"no {model}."
    )


def _closed() -> BackendUnavailable:
    return BackendUnavailable("The transformers engine was closed: make a new TransformersBackend.")


def _failure(error: BaseException) -> BackendError:
    # The engine's own message may quote what it was asked, so only its kind is passed on.
    return BackendError(f"The transformers engine failed with {type(error).__name__}.")
