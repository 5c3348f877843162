"""`rsafe eval`: how well the guard agrees with labelled data."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from rsafe_plugins import Guard
from rsafe_plugins.commands import common
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.metrics import Metrics, measure
from rsafe_plugins.evaluation.run import judge, sample

COLUMNS = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false positives",
    "auroc": "AUROC",
    "auprc": "AUPRC",
}


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--policy", metavar="NAME|PATH", help="For prompts and responses. Default: rsafe-18.")
@click.option("--document-policy", default="prompt-injection", show_default=True, metavar="NAME|PATH")
@click.option("--backend", metavar="ENGINE", help="For example embedded, llamacpp:PATH.")
@click.option("--reasoning", type=click.Choice(["never", "always", "adaptive"]))
@click.option(
    "--threshold", type=click.FloatRange(0, 1), metavar="P", help="Unsafe from this probability on."
)
@click.option("--template", metavar="PATH", type=click.Path(), help="The wording of the guard's prompt.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="At most so many items a file, always the same ones."
)
@click.option(
    "--verdicts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep every verdict in this file; a run that was stopped goes on from it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a file, and nothing else.")
def evaluate(
    files: tuple[Path, ...],
    policy: str | None,
    document_policy: str,
    limit: int | None,
    verdicts: Path | None,
    as_json: bool,
    **settings: Any,
) -> int:
    """Judges the labelled items of each FILE (JSON Lines) and prints F1, both errors and the areas.

    A check that fails counts as wrong, and failures are shown.
    """
    sets = {path: sample(read_items(path), limit) for path in files}
    guards = {
        True: common.make_guard(policy=document_policy, **settings),
        False: common.make_guard(policy=policy, **settings),
    }

    def guard_for(item: LabelledItem) -> Guard:
        return guards[item.task == "document"]

    rows: dict[Path, Metrics] = {}
    with _progress() as progress:
        for path, items in sets.items():
            bar = progress.add_task(path.stem, total=len(items))
            found = judge(items, guard_for, verdicts, on_progress=partial(_show, progress, bar))
            rows[path] = measure(items, found)
            if as_json:
                common.print_json({"file": path.name, **asdict(rows[path])})
    if not as_json:
        common.console().print(_table(rows))
    return 0


def _show(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _table(rows: dict[Path, Metrics]) -> Table:
    table = Table()
    table.add_column("set")
    for title in ("items (unsafe)", *COLUMNS.values(), "failures", "tokens"):
        table.add_column(title, justify="right")
    for path, metrics in rows.items():
        figures = [getattr(metrics, name) for name in COLUMNS]
        table.add_row(
            path.stem,
            f"{metrics.items} ({metrics.unsafe})",
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
            str(metrics.failures),
            f"{metrics.tokens:.0f}",
        )
    return table
