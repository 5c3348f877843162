"""Runs of `rsafe align` and `rsafe eval` as a user would start them, on the embedded guard's training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_CLI = "rsafe_plugins.cli"
SMALL_POLICIES = ("--others", "3")
"""Options with which `flips` judges by small policies."""


def training_files(
    folder: Path,
    *,
    wildguard: int | None = None,
    surge: int | None = None,
    ailuminate: int = 500,
    hatecheck: int = 1400,
    gptfuzz: int = 1200,
    jailbreakbench: int = 450,
) -> list[str]:
    """What `rsafe align` is given. The order of the files decides which items are drawn when."""
    names = (
        "wildguard_train.jsonl" + (f"@{wildguard}" if wildguard else ""),
        "aegis_train.jsonl",
        "surge_toxicity.jsonl" + (f"@{surge}" if surge else ""),
        f"ailuminate_demo.jsonl@{ailuminate}",
        f"hatecheck.jsonl@{hatecheck}",
        f"gptfuzz_responses.jsonl@{gptfuzz}",
        f"jailbreakbench_artifacts.jsonl@{jailbreakbench}",
        "deepset_injection_train.jsonl",
    )
    return [str(folder / name) for name in names]


def align(
    stage: str,
    files: Iterable[str],
    out: Path,
    *options: str,
    recipe: str = "embedded",
    processes: int | None = None,
) -> Path:
    """One stage by a recipe of the embedded guard; nothing where it is done. Returns the PEFT adapter's folder.

    Args:
        stage: `warm-start` or `grpo`.
        files: What to train on.
        out: The run's folder.
        options: More options of `rsafe align`.
        recipe: Its name.
        processes: How many to start; None for one a GPU, or one a processor.
    """
    if not (out / "run.json").exists():
        processes = processes or torch.cuda.device_count() or os.cpu_count() or 1
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        recipe = ["--stage", stage, "--recipe", recipe, "--out", str(out)]
        subprocess.run(
            [sys.executable, *launch, "-m", _CLI, "align", *recipe, *options, *files],
            check=True,
            env={"OMP_NUM_THREADS": "1", **os.environ} if processes > 1 else None,
        )
    return out / "adapter"


def flips(sets: Path, limit: int, *options: str | Path) -> dict[str, Any]:
    """Whether a guard follows its policy, on so many items of BeaverTails: what `--adherence` says of them together."""
    name, taxonomy = "beavertails_test.jsonl", "beavertails"
    return evaluated(sets / name, "--limit", str(limit), "--adherence", taxonomy, *options)[-1]


def evaluated(*arguments: str | Path) -> list[dict[str, Any]]:
    """What `rsafe eval --json` prints."""
    command = [sys.executable, "-m", _CLI, "eval", "--json", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
