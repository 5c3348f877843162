"""What quantizing costs the embedded guard: its bare verdicts in three forms, on at most 200 labelled items.

Takes labelled files as `rsafe eval` does; use items that the adapter wasn't trained on.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.record import Part, sound
from rsafe_plugins import Guard
from rsafe_plugins.backends import Backend, LlamaCppBackend
from rsafe_plugins.backends.merge import dequantized
from rsafe_plugins.backends.weights import PACKAGED_ADAPTER, embedded_weights
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.metrics import measure
from rsafe_plugins.evaluation.run import sample

ITEMS = 200


def scores(part: Part, name: str, backend: Backend, items: list[LabelledItem]) -> np.ndarray:
    """The probability of unsafe of each item."""
    guard = Guard(backend=backend, reasoning="never", timeout=600)
    verdicts = guard.check_many(item.content() for item in items)
    asyncio.run(backend.aclose())
    sound(verdicts)
    part.add(f"{name}: AUROC", measure(items, verdicts).auroc or float("nan"))
    return np.array([verdict.score for verdict in verdicts])


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
    forms = {
        "adapter beside Q4_1": LlamaCppBackend(weights, adapter=PACKAGED_ADAPTER),
        "as it ships, merged to Q4_0": LlamaCppBackend(adapter=PACKAGED_ADAPTER),
    }
    for name, backend in forms.items():
        moved = np.abs(scores(part, name, backend, items) - whole)
        part.add(f"{name}: probabilities moved, on average", float(moved.mean()))
        part.add(f"{name}: the most that one moved", float(moved.max()))
    part.save()


if __name__ == "__main__":
    main()
