"""Trains the adapter that ships with the package again, from the folder with its data; goes on where it was stopped.

Both runs end after as many items as they did then, when the clock ended them; so their learning rates fell with time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.record import FOLDER

SHARED = (
    "wildguard_train.jsonl",
    "aegis_train.jsonl",
    "surge_toxicity.jsonl",
    "ailuminate_demo.jsonl@500",
    "jailbreakbench_artifacts.jsonl@450",
    "deepset_injection_train.jsonl",
)
# The order of the files decides which items are drawn when.
FIRST = (*SHARED[:4], "hatecheck.jsonl@700", "gptfuzz_responses.jsonl@900", *SHARED[4:])
SECOND = (*SHARED[:4], "hatecheck.jsonl@1400", "gptfuzz_responses.jsonl@1200", *SHARED[4:])


def align(folder: Path, files: tuple[str, ...], out: Path, *options: str) -> None:
    """One run of the warm start, on all processors; nothing where it is done."""
    if (out / "run.json").exists():
        return
    processes = torch.cuda.device_count() or os.cpu_count() or 1
    launch = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "rsafe_plugins.cli", "align"]
    recipe = ["--stage", "warm-start", "--recipe", "embedded", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", *launch, *recipe, *options, *(str(folder / name) for name in files)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Expected the folder with the training data as JSON Lines: make adapter DATA=FOLDER")
    folder, out = Path(sys.argv[1]), FOLDER.with_name("adapter")
    first, second = out / "first", out / "second"
    align(folder, FIRST, first, "--set", "items=5264")
    changes = ("--set", "items=5248", "--learning-rate", "4e-4")
    align(folder, SECOND, second, *changes, "--adapter", str(first / "adapter"))
    backend = f"embedded:{second / 'guard-adapter.gguf'}"
    fit = ["--reasoning", "never", "--unsafe-share", "0.5", "--fit", str(out / "fitted.yaml")]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "rsafe_plugins.cli",
            "eval",
            str(second / "held-out.jsonl"),
            "--backend",
            backend,
            *fit,
        ],
        check=True,
    )
    print(f"\nThe adapter: {second / 'guard-adapter.gguf'}; its thresholds: {out / 'fitted.yaml'}")


if __name__ == "__main__":
    main()
