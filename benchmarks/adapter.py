"""Trains the adapter that ships with the package again, from the folder with its data; goes on where it was stopped.

All runs end after as many items as they did then, when the clock ended them and their learning rates fell with time.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.record import FOLDER
from benchmarks.training import align, evaluated, training_files
from rsafe_plugins.alignment.export import export_gguf
from rsafe_plugins.alignment.warm_start import load_base
from rsafe_plugins.backends.weights import embedded_weights

_WEIGHTS = "adapter_model.safetensors"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Expected the folder with the training data as JSON Lines: make adapter DATA=FOLDER")
    folder, out = Path(sys.argv[1]), FOLDER.with_name("adapter")
    files = training_files(folder, hatecheck=700, gptfuzz=900)
    first = align("warm-start", files, out / "first", "--set", "items=5264")
    changes = ("--set", "items=5248", "--learning-rate", "4e-4", "--adapter", str(first))
    second = align("warm-start", training_files(folder), out / "second", *changes)
    files = training_files(folder, ailuminate=1160, jailbreakbench=1310)
    changes = ("--set", "items=5242", "--set", "dtype=bfloat16", "--adapter", str(second))
    third = align("warm-start", files, out / "third", *changes, recipe="embedded-categories")
    adapter = out / "guard-adapter.gguf"
    model, _ = load_base(embedded_weights())
    export_gguf(mean(second, third, out / "mean"), model.config.to_dict(), adapter, name="rsafe guard")
    fitted = out / "fitted.yaml"
    bare = ("--backend", f"embedded:{adapter}", "--reasoning", "never", "--category-threshold", "0.4")
    evaluated(third.parent / "held-out.jsonl", *bare, "--unsafe-share", "0.5", "--fit", fitted)
    print(f"The adapter: {adapter}; its thresholds: {fitted}")


def mean(before: Path, after: Path, out: Path) -> Path:
    """The adapter halfway between two of which one went on from the other.

    It keeps more of what the first knew, and most of what the second learned (arXiv 2109.01903).
    """
    shutil.copytree(after, out, dirs_exist_ok=True)
    old, new = (load_file(folder / _WEIGHTS) for folder in (before, after))
    save_file({name: (old[name] + new[name]) / 2 for name in new}, out / _WEIGHTS)
    return out


if __name__ == "__main__":
    main()
