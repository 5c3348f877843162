"""What quantizing costs the embedded guard, and what it brings: its verdicts and thoughts in four forms.

Takes labelled files as `rsafe eval` does; use items that the adapter wasn't trained on. At most 200 are judged without
a thought, and 60 of them with one.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.record import Part, sound
from rsafe_plugins import Guard, Verdict
from rsafe_plugins.backends import Backend, LlamaCppBackend
from rsafe_plugins.backends.merge import dequantized, merged_weights
from rsafe_plugins.backends.weights import PACKAGED_ADAPTER, embedded_weights
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.metrics import measure
from rsafe_plugins.evaluation.run import sample

ITEMS, THOUGHTS = 200, 60


def scores(part: Part, name: str, backend: Backend, items: list[LabelledItem]) -> np.ndarray:
    """The probability of unsafe of each item; also measures the guard in that form, with and without a thought."""
    bare = Guard(backend=backend, reasoning="never", timeout=600, name_categories=False)
    thinking = Guard(backend=backend, reasoning="always", timeout=600, name_categories=False)
    verdicts = _one_by_one(bare, items)
    few = items[:THOUGHTS]
    thoughts = _one_by_one(thinking, few)
    asyncio.run(backend.aclose())
    part.add(f"{name}: AUROC", measure(items, verdicts).auroc or float("nan"))
    part.add(f"{name}: a verdict, median", median(one.latency_ms or 0 for one in verdicts), "ms")
    part.add(f"{name}: AUROC after a thought", measure(few, thoughts).auroc or float("nan"))
    whole = [one.usage.completion_tokens < thinking.settings.max_reasoning_tokens for one in thoughts]
    part.add(f"{name}: thoughts that end by themselves", 100 * sum(whole) / len(whole), "%")
    return np.array([verdict.score for verdict in verdicts])


def _one_by_one(guard: Guard, items: list[LabelledItem]) -> list[Verdict]:
    verdicts = [guard.check(item.content()) for item in items]
    sound(verdicts)
    return verdicts


def main() -> None:
    read = [item for name in sys.argv[1:] for item in read_items(name) if item.task != "document"]
    if not read:
        sys.exit("Expected labelled prompts or responses: python -m benchmarks.forms FILE.jsonl")
    items = sample(read, ITEMS)
    part = Part("forms", f"What quantizing costs the embedded guard, {len(items)} items")
    weights = embedded_weights()
    with tempfile.TemporaryDirectory() as folder:
        exact = dequantized(weights, Path(folder) / "base.F32.gguf")
        whole = scores(
            part, "adapter beside float32", LlamaCppBackend(exact, adapter=PACKAGED_ADAPTER), items
        )
        smaller = merged_weights(weights, PACKAGED_ADAPTER, Path(folder), "Q4_0")
        forms = {
            "adapter beside Q4_1": LlamaCppBackend(weights, adapter=PACKAGED_ADAPTER),
            "merged to Q4_0": LlamaCppBackend(smaller, adapter=None, flash_attention=False),
            "as it ships, merged to Q8_0": LlamaCppBackend(adapter=PACKAGED_ADAPTER),
        }
        for name, backend in forms.items():
            moved = np.abs(scores(part, name, backend, items) - whole)
            part.add(f"{name}: probabilities moved, on average", float(moved.mean()))
            part.add(f"{name}: the most that one moved", float(moved.max()))
    part.save()


if __name__ == "__main__":
    main()
