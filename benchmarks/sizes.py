"""What size buys: the same training of several bases, on as many examples each, side by side.

Takes the folder of the training data, the folder of the public sets, how many examples each is given, and the bases as
GGUF files. Writes a table. Goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.record import FOLDER
from benchmarks.training import align, table_row, training_files, write_table

OUT = FOLDER.with_name("sizes")
# Whole policies and single categories in one training, with documents made of prompts.
SETTINGS = (
    "dtype=bfloat16",
    "by_category=0.4",
    "thoughts=0.1",
    "max_prompt_tokens=96",
    "prompts_as_documents=800",
    "injected_documents=500",
)
OPTIONS = ("--first-layer", "8", "--learning-rate", "4e-4")
FIT = ("--category-threshold", "0.4")


def main() -> None:
    folders, bases = [Path(name) for name in sys.argv[1:3]], [Path(name) for name in sys.argv[4:]]
    given = bases and all(folder.is_dir() for folder in folders) and all(base.is_file() for base in bases)
    if not given or not sys.argv[3].isdecimal() or len({base.stem for base in bases}) < len(bases):
        sys.exit(
            "Expected: python -m benchmarks.sizes TRAINING-FOLDER PUBLIC-SETS-FOLDER EXAMPLES BASE.gguf..., with bases "
            "of different names"
        )
    items = int(sys.argv[3])
    out = OUT / f"{items}-examples"  # so that a run of another size starts anew
    files = training_files(
        folders[0],
        wildguard=1500,
        surge=400,
        ailuminate=1160,
        hatecheck=300,
        gptfuzz=500,
        jailbreakbench=1310,
    )
    settings = [word for setting in (*SETTINGS, f"items={items}") for word in ("--set", setting)]

    def rows() -> Iterator[list[str]]:
        for base in bases:
            folder = out / base.stem
            align("warm-start", files, folder, "--base", str(base), *settings, *OPTIONS)
            backend = f"llamacpp:{base}#{folder / 'guard-adapter.gguf'}"
            yield [base.stem, *table_row(folder, backend, folders[1], FIT)]

    write_table(out, "Base", rows(), f"{items} examples")


if __name__ == "__main__":
    main()
