"""`rsafe eval`: how well the guard agrees with labelled data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rsafe_plugins import Guard, Policy, Verdict
from rsafe_plugins.commands import common
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.adherence import Adherence, adherence
from rsafe_plugins.evaluation.fit import fit
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.metrics import Metrics, measure
from rsafe_plugins.evaluation.run import judge, sample
from rsafe_plugins.guard.fitted import OperatingPoint, write
from rsafe_plugins.policy.taxonomies import taxonomy_names

COLUMNS = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false positives",
    "auroc": "AUROC",
    "auprc": "AUPRC",
}

GUARD_FAILED = 3


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--policy", metavar="NAME|PATH", help="For prompts and responses. Default: rsafe-18.")
@click.option("--document-policy", default="prompt-injection", show_default=True, metavar="NAME|PATH")
@click.option("--backend", metavar="ENGINE", help="For example embedded, llamacpp:PATH, openai:URL#MODEL.")
@click.option(
    "--dialect",
    metavar="NAME|PATH",
    help="How the guard model is asked and answers. Default: guessed from the model's name.",
)
@click.option("--reasoning", type=click.Choice(["never", "always", "adaptive"]))
@click.option(
    "--threshold",
    type=common.Threshold(),
    metavar="P|FILE",
    help="Unsafe from this probability on, or a file that --fit wrote.",
)
@click.option("--template", metavar="PATH", type=click.Path(), help="The wording of the guard's prompt.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="At most so many items a file, always the same ones."
)
@click.option(
    "--verdicts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep every verdict in this file; a run that was stopped goes on from it. Models are told apart by "
    "their file's name: take a new file for a new adapter.",
)
@click.option(
    "--fit",
    "fit_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Fit threshold and band on these items, bare and with a thought, and put them into this file. With "
    "--reasoning never only the threshold, and the guard never thinks.",
)
@click.option(
    "--unsafe-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="With --fit: how much of the traffic that the guard is for is unsafe. Default: as in the files.",
)
@click.option(
    "--adherence",
    "taxonomy",
    type=click.Choice(taxonomy_names()),
    help="Measure whether the guard follows its policy, on items that are labelled with categories of this taxonomy.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, and nothing else.")
def evaluate(
    files: tuple[Path, ...],
    policy: str | None,
    document_policy: str,
    limit: int | None,
    verdicts: Path | None,
    fit_file: Path | None,
    unsafe_share: float | None,
    taxonomy: str | None,
    as_json: bool,
    **settings: Any,
) -> int:
    """Judges the labelled items of each FILE (JSON Lines) and prints F1, both errors and the areas.

    A check that fails counts as wrong, and failures are shown; if all fail, the exit status is 3. With --fit it
    judges every item twice and writes where the guard should draw its lines: threshold=FILE in the guard's
    settings uses them. Fit on items that neither training nor the evaluation has seen.

    With --adherence each item that is labelled unsafe is judged by the policy and by the same without the item's
    categories: a guard that follows its policy finds it unsafe, then safe.
    """
    if find_spec("sklearn") is None:
        raise click.UsageError('Measuring needs scikit-learn: pip install "rsafe-plugins[eval]".')
    sets = {path: sample(read_items(path), limit) for path in files}
    if fit_file is not None:
        return _fit(sets, policy, document_policy, verdicts, fit_file, unsafe_share, as_json, settings)
    if taxonomy is not None:
        return _adherence(sets, policy, taxonomy, verdicts, as_json, settings)
    guards = _guards(policy, document_policy, settings)
    rows: dict[Path, Metrics] = {}
    with _progress() as progress:
        for path, items in sets.items():
            rows[path] = measure(items, _judge(progress, path.stem, items, guards, verdicts))
            if as_json:
                common.print_json({"file": path.name, **asdict(rows[path])})
    if not as_json:
        common.console().print(_table(rows))
    nothing_worked = all(metrics.failures == metrics.items for metrics in rows.values())
    return GUARD_FAILED if nothing_worked else 0


def _fit(
    sets: Mapping[Path, Sequence[LabelledItem]],
    policy: str | None,
    document_policy: str,
    verdicts: Path | None,
    file: Path,
    unsafe_share: float | None,
    as_json: bool,
    settings: Mapping[str, Any],
) -> int:
    if settings["reasoning"] not in (None, "never"):
        raise click.UsageError(
            "--fit judges both ways, or with --reasoning never only without a thought; leave --reasoning out."
        )
    items = [item for part in sets.values() for item in part]
    modes = {"never": _guards(policy, document_policy, {**settings, "reasoning": "never"})}
    if settings["reasoning"] is None and modes["never"][False].dialect.thought is not None:
        modes["always"] = _guards(policy, document_policy, {**settings, "reasoning": "always"})
    with _progress() as progress:
        judged = [_judge(progress, mode, items, guards, verdicts) for mode, guards in modes.items()]
    bare, thought = judged[0], judged[-1]
    points: dict[str, OperatingPoint] = {}
    lines = []
    for guard in modes["never"].values():
        mine = [n for n, item in enumerate(items) if modes["never"][item.task == "document"] is guard]
        fitted = fit(
            [items[n] for n in mine], [bare[n] for n in mine], [thought[n] for n in mine], unsafe_share
        )
        if fitted is None:
            continue
        points[guard.policy.name] = OperatingPoint(
            threshold=fitted.threshold, band=fitted.band, digest=guard.policy.digest
        )
        lines.append({"policy": guard.policy.name, "items": len(mine), **asdict(fitted)})
    if not points:
        raise DataError(
            "Fitting needs safe and unsafe items that the guard could score; there are none of one of them."
        )
    write(file, modes["never"][False].backend.model, points)
    for line in lines:
        if as_json:
            common.print_json(line)
        else:
            common.console().print(
                f"{line['policy']}: unsafe from {line['threshold']} on, think from {line['band'][0]} to "
                f"{line['band'][1]}. F1 on these {line['items']} items: never {line['never']:.3f}, adaptive "
                f"{line['adaptive']:.3f}, always {line['always']:.3f}; adaptive generates "
                f"{line['token_share']:.0%} of the tokens of always."
            )
    return 0


def _adherence(
    sets: Mapping[Path, Sequence[LabelledItem]],
    policy: str | None,
    taxonomy: str,
    verdicts: Path | None,
    as_json: bool,
    settings: Mapping[str, Any],
) -> int:
    items = [item for part in sets.values() for item in part]
    whole = Policy.load(policy or "rsafe-18")
    with _progress() as progress:
        bar = progress.add_task("adherence", total=None)
        rows = adherence(
            items,
            taxonomy,
            whole,
            lambda one: common.make_guard(policy=one, on_error="block", **settings),
            verdicts,
            on_progress=lambda done: progress.update(bar, completed=done),
        )
    if as_json:
        for row in rows:
            common.print_json({**asdict(row), "flip_rate": row.flip_rate})
    else:
        common.console().print(_adherence_table(rows, whole))
    return GUARD_FAILED if rows[-1].failures == rows[-1].items else 0


def _adherence_table(rows: Sequence[Adherence], policy: Policy) -> Table:
    table = Table()
    table.add_column("category")
    for title in ("items", "unsafe with it", "safe without it", "both", "failures"):
        table.add_column(title, justify="right")
    for row in rows:
        name = f"{row.category} {policy.category(row.category).name}" if row.category else "all"
        shares = [part / row.items for part in (row.unsafe_with, row.safe_without, row.flipped)]
        table.add_row(
            Text(name),
            str(row.items),
            *(f"{share:.0%}" for share in shares),
            str(row.failures),
            end_section=not row.category,
        )
    return table


def _guards(policy: str | None, document_policy: str, settings: Mapping[str, Any]) -> dict[bool, Guard]:
    """The guard for prompts and responses (False), and the one for documents (True)."""
    return {
        False: common.make_guard(policy=policy, on_error="block", **settings),
        True: common.make_guard(policy=document_policy, on_error="block", **settings),
    }


def _judge(
    progress: Progress,
    title: str,
    items: Sequence[LabelledItem],
    guards: Mapping[bool, Guard],
    verdicts: Path | None,
) -> list[Verdict]:
    bar = progress.add_task(title, total=len(items))
    return judge(
        items,
        lambda item: guards[item.task == "document"],
        verdicts,
        on_progress=lambda done: progress.update(bar, completed=done),
    )


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
