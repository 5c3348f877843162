"""Runs of `rsafe align` and `rsafe eval` as a user would start them, on the embedded guard's training data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine

_CLI = "rsafe_plugins.cli"
SMALL_POLICIES = ("--others", "3")
"""Options with which `flips` judges by small policies."""
SETS = ("toxicchat", "openai_moderation", "beavertails_test", "harmbench_responses")
EACH = 100  # items that are drawn of each
POLICIES = {"Flip rate": (), "with three others": SMALL_POLICIES}


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


def table_row(
    folder: Path, backend: str, sets: Path, fit: Sequence[str] = (), asked: Sequence[str] = ()
) -> list[str]:
    """The cells of a training: on each of `SETS` the area under the ROC curve and F1, and the flip rates.

    Args:
        folder: Of the training; its thresholds are fitted on what it held out.
        backend: The guard that came out of it.
        sets: Folder of the public sets.
        fit: More options of `rsafe eval` where thresholds are fitted.
        asked: More of them everywhere.
    """
    fitted = folder / "fitted.yaml"
    options = ("--backend", backend, "--reasoning", "never", "--verdicts", folder / "verdicts.jsonl", *asked)
    if not fitted.exists():
        evaluated(folder / "held-out.jsonl", *options, "--fit", fitted, "--unsafe-share", "0.5", *fit)
    options = (*options, "--threshold", fitted)
    cells = []
    for name in SETS:
        (result,) = evaluated(sets / f"{name}.jsonl", *options, "--limit", str(EACH))
        cells.append(f"{result['auroc']:.2f}, {result['f1']:.2f}")
    for policies in POLICIES.values():
        total = flips(sets, EACH, *options, *policies)
        cells.append(f"{total['flip_rate']:.2f} of {total['items']}")
    return cells


def write_table(out: Path, first: str, rows: Iterable[Sequence[str]], trained: str) -> None:
    """Prints each row as it comes, and writes the table.

    Args:
        out: The folder for `table.md`.
        first: Title of the first column.
        rows: What the row is of, then its cells as `table_row` gives them.
        trained: What each was given.
    """
    titles = [first, *SETS, *POLICIES]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        f"AUROC, F1 at the threshold fitted on held-out items; {trained}; {time.strftime('%Y-%m-%d')}, "
        f"{machine()['cores']} cores ({machine()['cpu']}).",
    ]
    (out / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"Written: {out / 'table.md'}")


def evaluated(*arguments: str | Path) -> list[dict[str, Any]]:
    """What `rsafe eval --json` prints; no names of categories are asked for, on which no figure rests."""
    command = [sys.executable, "-m", _CLI, "eval", "--json", *map(str, arguments)]
    environment = {"RSAFE_NAME_CATEGORIES": "false", **os.environ}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]
