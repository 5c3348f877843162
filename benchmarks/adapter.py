"""Trains the adapter that ships with the package again, from the folder with its data; goes on where it was stopped.

Both runs end after as many items as they did then, when the clock ended them; so their learning rates fell with time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.record import FOLDER
from benchmarks.training import align, evaluated, training_files


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Expected the folder with the training data as JSON Lines: make adapter DATA=FOLDER")
    folder, out = Path(sys.argv[1]), FOLDER.with_name("adapter")
    files = training_files(folder, hatecheck=700, gptfuzz=900)
    first = align("warm-start", files, out / "first", "--set", "items=5264")
    changes = ("--set", "items=5248", "--learning-rate", "4e-4", "--adapter", str(first))
    adapter = (
        align("warm-start", training_files(folder), out / "second", *changes).parent / "guard-adapter.gguf"
    )
    held_out, fitted = out / "second" / "held-out.jsonl", out / "fitted.yaml"
    bare = ("--backend", f"embedded:{adapter}", "--reasoning", "never")
    evaluated(held_out, *bare, "--unsafe-share", "0.5", "--fit", fitted)
    print(f"The adapter: {adapter}; its thresholds: {fitted}")


if __name__ == "__main__":
    main()
