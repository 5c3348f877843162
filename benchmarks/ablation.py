"""What each part of training does for the embedded guard: several trainings on the same items, side by side.

Takes the folder of the training data, the folder of the public sets, how many items each warm start is given, how
many steps GRPO, and the names of the trainings that are wanted, all by default. Writes a table. Goes on where it was
stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import FOLDER
from benchmarks.training import align, table_row, training_files, write_table

OUT = FOLDER.with_name("ablation")
ONE_POLICY = ("--set", "policies.whole=1", "--set", "policies.names=0", "--set", "policies.reworded=0")


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        name: Of its folder.
        title: Of its row.
        options: Of `rsafe align`.
        after: The training whose adapter it goes on from by GRPO; empty for a warm start.
        asked: Options of `rsafe eval`: how it is asked.
        fitted: More of them, where its thresholds are fitted.
    """

    name: str
    title: str
    options: tuple[str, ...] = ()
    after: str = ""
    asked: tuple[str, ...] = ()
    fitted: tuple[str, ...] = ()


VARIANTS = (
    Variant(
        "labels",
        "labels alone, one policy",
        (*ONE_POLICY, "--set", "thoughts=0", "--set", "category_weight=0"),
    ),
    Variant("one-policy", "warm start, one policy", ONE_POLICY),
    Variant("policies", "warm start, policies drawn"),
    Variant(
        "one-policy-grpo",
        "warm start and GRPO, one policy",
        (*ONE_POLICY, "--set", "adherence_weight=0"),
        after="one-policy",
    ),
    Variant("policies-grpo", "warm start and GRPO, policies drawn", after="policies"),
    Variant(
        "by-category",
        "one question for each category",
        ("--by-category",),
        asked=("--dialect", "rsafe-by-category"),
    ),
    Variant(
        "both",
        "the whole policy, then which category",
        ("--set", "by_category=0.6"),
        fitted=("--category-threshold", "0.5"),
    ),
)


def train(variant: Variant, data: Path, items: int, steps: int, out: Path) -> None:
    """The variant's training, in one process."""
    files = training_files(data)
    if variant.after:
        options = ("--adapter", str(out / variant.after / "adapter"), "--set", f"steps={steps}")
        align("grpo", files[:-1], out / variant.name, *options, *variant.options, processes=1)
    else:
        options = ("--set", f"items={items}", "--set", "dtype=bfloat16")
        align("warm-start", files, out / variant.name, *options, *variant.options, processes=1)


def trained(variants: Sequence[Variant], data: Path, items: int, steps: int, out: Path) -> None:
    """All trainings: warm starts first, then what goes on from them; side by side, as many as there are processors."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    at_once = len(variants) if torch.cuda.is_available() else os.cpu_count() or 1
    with ThreadPoolExecutor(at_once) as pool:
        for later in (False, True):
            stage = [variant for variant in variants if bool(variant.after) is later]
            list(pool.map(lambda variant: train(variant, data, items, steps, out), stage))


def chosen(names: Sequence[str]) -> list[Variant]:
    """The trainings of these names and those that they go on from; all where none is named."""
    known = {variant.name: variant for variant in VARIANTS}
    if strange := [name for name in names if name not in known]:
        sys.exit(f"Expected names among {', '.join(known)}, not {strange[0]}.")
    wanted = {*names, *(known[name].after for name in names)} if names else {*known}
    return [variant for variant in VARIANTS if variant.name in wanted]


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:3]]
    if len(sys.argv) < 5 or not all(folder.is_dir() for folder in folders):
        sys.exit(
            "Expected: python -m benchmarks.ablation TRAINING-FOLDER PUBLIC-SETS-FOLDER ITEMS STEPS [NAME...]"
        )
    items, steps = int(sys.argv[3]), int(sys.argv[4])
    variants = chosen(sys.argv[5:])
    out = OUT / f"{items}-items-{steps}-steps"  # so that a run of another size starts anew
    trained(variants, folders[0], items, steps, out)

    def rows() -> Iterator[list[str]]:
        for variant in variants:
            folder = out / variant.name
            backend = f"embedded:{folder / 'guard-adapter.gguf'}"
            cells = table_row(folder, backend, folders[1], variant.fitted, variant.asked)
            yield [variant.title, *cells]

    write_table(out, "Training", rows(), f"{items} items, {steps} steps of GRPO")


if __name__ == "__main__":
    main()
