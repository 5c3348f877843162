"""vLLM in process: what the guard adds to it, what its prefix cache saves, and what thinking costs.

Takes labelled files as `rsafe eval` does, and compares the ways of reasoning on at most 500 of their items.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Part, fifty, sound
from benchmarks.weights import guard_folder, percent_cached
from rsafe_plugins import Guard
from rsafe_plugins.backends import LlamaCppBackend, VLLMBackend
from rsafe_plugins.evaluation.items import read_items
from rsafe_plugins.evaluation.metrics import measure
from rsafe_plugins.evaluation.run import sample
from rsafe_plugins.guard.fitted import operating_point

ITEMS = 500


class Recorder:
    """Keeps what vLLM is asked, to ask it again by its own client."""

    def __init__(self, backend: VLLMBackend) -> None:
        running = backend._running
        assert running is not None
        self.engine, self.loop = running._engine, running._loop
        self._generate = self.engine.generate
        self.asked: list[tuple[Any, Any]] = []
        self.engine.generate = self._recorded

    def _recorded(self, prompt: Any, parameters: Any, **more: Any) -> Any:
        self.asked.append((prompt, parameters))
        return self._generate(prompt, parameters, **more)

    def forget(self) -> None:
        """Empties vLLM's prefix cache."""
        asyncio.run_coroutine_threadsafe(self.engine.reset_prefix_cache(), self.loop).result()

    def replay(self, run: int) -> float:
        """Seconds for all that was asked, at once and with nothing of ours in between."""
        asked, self.asked = self.asked, []

        async def one(number: int) -> None:
            prompt, parameters = asked[number]
            async for _ in self._generate(prompt, parameters, request_id=f"replay-{run}-{number}"):
                pass

        async def all_of_them() -> None:
            await asyncio.gather(*map(one, range(len(asked))))

        started = time.perf_counter()
        asyncio.run_coroutine_threadsafe(all_of_them(), self.loop).result()
        return time.perf_counter() - started


def lists(part: Part, guard: Guard, recorder: Recorder) -> None:
    """Fifty documents in one call, the same by vLLM's own client, and one after the other."""
    first = fifty("document", "first")[0]
    ours, own, single = [], [], []
    for run in range(3):
        documents = fifty("document", run)
        recorder.forget()
        guard.check(first)
        recorder.asked.clear()
        started = time.perf_counter()
        sound(guard.check_many(documents))
        ours.append(time.perf_counter() - started)
        recorder.forget()
        asked, recorder.asked = recorder.asked, []
        guard.check(first)
        recorder.asked = asked
        own.append(recorder.replay(run))
        started = time.perf_counter()
        sound([guard.check(document) for document in fifty("document", f"single {run}")])
        single.append(time.perf_counter() - started)
        recorder.asked.clear()
    best = statistics.median
    part.add("50 documents in one check_many", 50 / best(ours), "checks/s")
    part.add("the same requests by vLLM's own client", 50 / best(own), "checks/s")
    part.add("50 documents one by one", 50 / best(single), "checks/s")
    part.add("time of check_many, to that of vLLM's own client", best(ours) / best(own), "times", 1.15)


def modes(part: Part, backend: VLLMBackend, files: list[Path]) -> None:
    """Never, always and adaptive, on the same items."""
    items = sample([item for file in files for item in read_items(file)], ITEMS)
    contents = [item.content() for item in items]
    # The folder's name isn't the packaged guard's, for which the threshold was fitted.
    guard = Guard(backend=backend, reasoning="never")
    threshold = operating_point(LlamaCppBackend().model, guard.policy).threshold
    always_tokens = 0.0
    for name, reasoning, band in (
        ("never", "never", None),
        ("always", "always", None),
        # The fitted band is empty, which makes adaptive the same as never; this is what a band would cost.
        ("adaptive, 0.1 about the threshold", "adaptive", (threshold - 0.1, threshold + 0.1)),
    ):
        guard = Guard(backend=backend, reasoning=reasoning, threshold=threshold, band=band, timeout=600)
        started = time.perf_counter()
        verdicts = guard.check_many(contents)
        seconds = time.perf_counter() - started
        report = measure(items, verdicts)
        tokens = statistics.mean(verdict.usage.completion_tokens for verdict in verdicts)
        part.add(f"{name}: {len(items)} items", len(items) / seconds, "checks/s")
        part.add(f"{name}: F1", report.f1)
        part.add(f"{name}: tokens generated a check", tokens)
        part.add(f"{name}: failed checks", sum(verdict.error is not None for verdict in verdicts))
        if name == "always":
            always_tokens = tokens
        elif reasoning == "adaptive" and always_tokens:
            part.add(f"{name}: tokens, to those of always", tokens / always_tokens, "times", 1 / 3)


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    backend = VLLMBackend(guard_folder(), context=4096, dtype="bfloat16", block_size=32, enforce_eager=True)
    part = Part("vllm", "vLLM in process, the embedded guard's weights in bfloat16")
    started = time.perf_counter()
    asyncio.run(backend.start())
    part.add("start", time.perf_counter() - started, "s")
    guard = Guard("prompt-injection", backend=backend, reasoning="never", timeout=600)
    recorder = Recorder(backend)
    lists(part, guard, recorder)
    documents = fifty("document", "cached")[:10]
    harmless = Guard("prompt-injection", backend=backend, reasoning="never", threshold=1.0, timeout=600)
    verdicts = [harmless.check(document) for document in documents]
    sound(verdicts)
    tokenizer = recorder.engine.get_tokenizer()
    share = percent_cached(verdicts, tokenizer, guard, documents[0])
    part.add("policy tokens from the prefix cache", share, "%", 95, more=True)
    part.save()
    if files:
        modes(part, backend, files)
    part.save()
    asyncio.run(backend.aclose())


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    main()
