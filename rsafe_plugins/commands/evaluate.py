"""`rsafe eval`: how well the guard agrees with labelled data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from rsafe_plugins import Guard, Policy, Verdict
from rsafe_plugins.commands import common
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.adherence import Adherence, adherence
from rsafe_plugins.evaluation.fit import fit
from rsafe_plugins.evaluation.formats import FORMATS, read_set
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.run import judge, sample
from rsafe_plugins.guard.fitted import OperatingPoint, read, write
from rsafe_plugins.guard.settings import GuardSettings
from rsafe_plugins.policy.files import choices
from rsafe_plugins.policy.taxonomies import taxonomy_names

if TYPE_CHECKING:
    # These need numpy, which the other commands do without.
    from rsafe_plugins.evaluation.metrics import Interval, Metrics
    from rsafe_plugins.evaluation.results import Comparison, Result

_ERROR_COLUMNS = {
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "false_positive_rate": "false\npositives",
}
_SCORE_COLUMNS = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "recall_at_1_fpr": "recall at\n1% FP",
    "recall_at_5_fpr": "recall at\n5% FP",
    "calibration_error": "calibration\nerror",
}
_COST_COLUMNS = {"tokens": "tokens", "latency_p50_ms": "median\nms", "latency_p95_ms": "95%\nms"}

_NARROW = (0, 0)  # so that figures and names fit into 80 columns

GUARD_FAILED = 3
BASE = "base"

_COMPARABLE = (
    *(name for name in GuardSettings.model_fields if name not in ("on_error", "cache")),
    "document_policy",
)
_ERRORS_SAID = 3  # of those that made checks fail, the most frequent ones
_SPEED_WINDOW = 900.0  # seconds; a batch can take minutes, and the time left needs several of them


class _Variant(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """Settings of a guard to compare with, as `KEY=VALUE,KEY=VALUE`."""

    name = "KEY=VALUE,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, Any]]:
        """The text itself, which names the guard, and its settings."""
        settings = {}
        # A value may hold commas, as a band does, so only those before a key part the settings.
        for part in re.split(r",(?=\s*\w+\s*=)", value):
            key, equals, given = (piece.strip() for piece in part.partition("="))
            if not equals or not given:
                self.fail(f"expected KEY=VALUE, not {common.excerpt(part, 60)!r}.", param, ctx)
            if key not in _COMPARABLE:
                self.fail(f"there is no setting {choices(key, _COMPARABLE)}.", param, ctx)
            settings[key] = self._value(key, given, param, ctx)
        return value, settings

    def _value(self, key: str, given: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if key == "threshold":
            return common.Threshold().convert(given, param, ctx)
        try:
            # Numbers and lists, as in rsafe.yaml.
            return yaml.safe_load(given) if given[0] in "0123456789.[" else given
        except yaml.YAMLError:
            return given


@click.command("eval")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
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
@click.option(
    "--category-threshold",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="P",
    help="Compare what is unsafe under a policy of few categories with those that it leaves out; safe if one of its "
    "own fits better with less than this probability. 0 doesn't compare. With --fit it is put into the file.",
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
@click.option(
    "--compare",
    "variants",
    type=_Variant(),
    multiple=True,
    metavar="KEY=VALUE,...",
    help="Also judge with a guard that differs in these settings, such as reasoning=always or "
    "backend=llamacpp:PATH,threshold=0.4, and test the difference. Can be given several times.",
)
@click.option(
    "--by",
    "ways",
    type=click.Choice(["task", "category", "length", "mode"]),
    multiple=True,
    help="Also print the errors of each task, category, length, or of verdicts with and without a thought.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write a page with curves, calibration and every error. It holds judged texts and reasoning.",
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
@click.option(
    "--others",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --adherence: judge by small policies, of the item's categories and N others, instead of the whole one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, and nothing else.")
def evaluate(
    files: tuple[str, ...],
    policy: str | None,
    document_policy: str,
    limit: int | None,
    verdicts: Path | None,
    variants: tuple[tuple[str, dict[str, Any]], ...],
    ways: tuple[str, ...],
    report_file: Path | None,
    fit_file: Path | None,
    unsafe_share: float | None,
    taxonomy: str | None,
    others: int | None,
    as_json: bool,
    **settings: Any,
) -> int:
    """Judges the labelled items of each FILE and prints F1, both errors and what doesn't depend on a threshold.

    A FILE is one of ours (JSON Lines), or FORMAT:FILE for a public data set as it is published, or FORMAT: alone to
    fetch its test items from the Hugging Face hub. Formats: {formats}.

    A check that fails counts as wrong, and failures are shown; if all fail, the exit status is 3. With --fit it
    judges every item twice and writes where the guard should draw its lines: threshold=FILE in the guard's
    settings uses them. Fit on items that neither training nor the evaluation has seen.

    With --adherence each item that is labelled unsafe is judged by the policy and by the same without the item's
    categories: a guard that follows its policy finds it unsafe, then safe. What is labelled safe is judged once.
    """
    if find_spec("scipy") is None:
        raise click.UsageError('Measuring needs scipy: pip install "rsafe-plugins[eval]".')
    if (fit_file or taxonomy) and (variants or ways or report_file):
        raise click.UsageError(
            "--compare, --by and --report measure a guard: leave out --fit and --adherence."
        )
    if fit_file and taxonomy:
        raise click.UsageError("--fit and --adherence are two runs: leave one of them out.")
    if others and not taxonomy:
        raise click.UsageError("--others is for --adherence.")
    if unsafe_share and not fit_file:
        raise click.UsageError("--unsafe-share is for --fit.")
    named = [one for file in files for one in (file, file.partition(":")[2]) if one]
    read_from = {Path(one).resolve() for one in named}
    for option, written in (("--verdicts", verdicts), ("--report", report_file), ("--fit", fit_file)):
        if written is not None and written.resolve() in read_from:
            raise click.UsageError(
                f"{option} would write to {written}, which holds what is read or written, too."
            )
        read_from.update([written.resolve()] if written else [])
    if fit_file is not None and fit_file.exists():
        read(fit_file)  # one that can't be added to is found before anything is judged
    sets = _sets(files, limit)
    with _saying_how_to_go_on(verdicts):
        if fit_file is not None:
            return _fit(
                sets,
                policy,
                document_policy,
                verdicts,
                fit_file,
                as_json,
                settings,
                unsafe_share=unsafe_share,
            )
        if taxonomy is not None:
            return _adherence(sets, policy, taxonomy, others, verdicts, as_json, settings)
        base = {"policy": policy, "document_policy": document_policy, **settings}
        guards = {
            name: _guards(**{**base, **changed}) for name, changed in [(BASE, {}), *dict(variants).items()]
        }
        results = _results(sets, guards, verdicts, as_json)
    return _present(results, ways, report_file, as_json)


evaluate.help = (evaluate.help or "").format(formats=", ".join(FORMATS))


def _sets(files: Sequence[str], limit: int | None) -> dict[str, list[LabelledItem]]:
    """The items by the name of their set; sets with the same name by all of what was given."""
    found = [(file, read_set(file)) for file in dict.fromkeys(files)]
    names = [one.name for _, one in found]
    return {one.name if names.count(one.name) == 1 else file: sample(one.items, limit) for file, one in found}


@contextmanager
def _saying_how_to_go_on(verdicts: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            "rsafe: stopped; the same command goes on from here."
            if verdicts
            else "rsafe: stopped; with --verdicts FILE the next run goes on from where it was stopped.",
            err=True,
        )
        raise


def _results(
    sets: Mapping[str, Sequence[LabelledItem]],
    guards: Mapping[str, Mapping[bool, Guard]],
    verdicts: Path | None,
    as_json: bool,
) -> list[Result]:
    from rsafe_plugins.evaluation.results import Result

    results = []
    with _progress() as progress:
        for source, items in sets.items():
            for name, mine in guards.items():
                title = f"{source}, {name}" if len(guards) > 1 else source
                judged = _judge(progress, common.printable(title), items, mine, verdicts)
                used = {item.task == "document" for item in items}
                result = Result.of(source, name, [mine[kind] for kind in sorted(used)], items, judged)
                results.append(result)
                if as_json:
                    common.print_json(result.as_json())
    return results


def _present(results: Sequence[Result], ways: Sequence[str], report_file: Path | None, as_json: bool) -> int:
    from rsafe_plugins.evaluation.report import report
    from rsafe_plugins.evaluation.results import compared

    comparisons = compared(results)
    if as_json:
        for comparison in comparisons:
            common.print_json(comparison.as_json())
    else:
        console = common.console()
        console.print(_figures_table(results, _ERROR_COLUMNS, counts=True))
        console.print(_figures_table(results, _SCORE_COLUMNS))
        console.print(_figures_table(results, _COST_COLUMNS))
        if comparisons:
            console.print(_comparison_table(comparisons))
        for way in ways:
            console.print(_parts_table(results, way))
    if report_file is not None:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        report_file.write_text(report(results, comparisons), "utf-8", newline="\n")
    nothing_worked = all(result.metrics.failures == result.metrics.items for result in results)
    return GUARD_FAILED if nothing_worked else 0


def _fit(
    sets: Mapping[str, Sequence[LabelledItem]],
    policy: str | None,
    document_policy: str,
    verdicts: Path | None,
    file: Path,
    as_json: bool,
    settings: Mapping[str, Any],
    *,
    unsafe_share: float | None,
) -> int:
    if settings["reasoning"] not in (None, "never"):
        raise click.UsageError(
            "--fit judges both ways, or with --reasoning never only without a thought; leave --reasoning out."
        )
    items = [item for part in sets.values() for item in part]
    categories = settings["category_threshold"] or 0.0
    # A guard that can't be asked so says it here; what is fitted is the verdict before it.
    asked = _guards(policy, document_policy, **{**settings, "reasoning": "never"})
    settings = {**settings, "category_threshold": 0.0}
    if isinstance(asked[False].settings.threshold, Path):
        settings["threshold"] = 0.5  # it may hold nothing of this model yet
    modes = {"never": _guards(policy, document_policy, **{**settings, "reasoning": "never"})}
    if settings["reasoning"] is None and modes["never"][False].dialect.thought is not None:
        modes["always"] = _guards(policy, document_policy, **{**settings, "reasoning": "always"})
    with _progress() as progress:
        judged = [_judge(progress, mode, items, mine, verdicts) for mode, mine in modes.items()]
        if all(one.label is None for part in judged for one in part):
            return GUARD_FAILED
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
            point = OperatingPoint(
                threshold=fitted.threshold,
                band=fitted.band,
                category_threshold=categories,
                digest=guard.policy.digest,
            )
            points.setdefault(guard.policy.name, point)
            scored = sum(bare[n].score is not None and thought[n].score is not None for n in mine)
            lines.append({"policy": guard.policy.name, "items": scored, **asdict(fitted)})
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
    sets: Mapping[str, Sequence[LabelledItem]],
    policy: str | None,
    taxonomy: str,
    others: int | None,
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
            others=others,
        )
    if as_json:
        for row in rows:
            common.print_json({**asdict(row), "flip_rate": row.flip_rate})
    else:
        common.console().print(_adherence_table(rows, whole))
    total = rows[-1]
    return GUARD_FAILED if total.failures == total.items + total.harmless else 0


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
    if total := rows[-1].harmless:
        table.add_row("harmless items", str(total), f"{rows[-1].false_positives / total:.0%}")
    return table


def _guards(policy: str | None, document_policy: str, **settings: Any) -> dict[bool, Guard]:
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
    judged = judge(
        items,
        lambda item: guards[item.task == "document"],
        verdicts,
        on_progress=lambda done: progress.update(bar, completed=done),
    )
    for error, count in Counter(one.error for one in judged if one.error).most_common(_ERRORS_SAID):
        said = common.printable(f"rsafe: {title}: {count} of {len(items)} checks failed: {error}")
        progress.console.print(Text(said), soft_wrap=True)
    return judged


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=_SPEED_WINDOW,
    )


def _figures_table(results: Sequence[Result], columns: Mapping[str, str], *, counts: bool = False) -> Table:
    """A row for each guard on each set: the figures, and below each its interval."""
    several = len({result.guard for result in results}) > 1
    table = Table(box=SIMPLE_HEAD, padding=_NARROW)
    table.add_column("set" if not several else "set\nguard", overflow="fold")
    titles = ["items\n(unsafe)", *columns.values(), "failures"] if counts else list(columns.values())
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        metrics = result.metrics
        cells = [_cell(metrics, result.intervals, name) for name in columns]
        if counts:
            cells = [f"{metrics.items}\n({metrics.unsafe})", *cells, str(metrics.failures)]
        name = f"{result.source}\n{result.guard}" if several else result.source
        table.add_row(Text(common.printable(name)), *cells)
    return table


def _parts_table(results: Sequence[Result], way: str) -> Table:
    """A row for each part of each set: how many items, both errors and F1 with their intervals."""
    several = len({result.guard for result in results}) > 1
    table = Table(box=SIMPLE_HEAD, padding=_NARROW)
    table.add_column("set\nguard" if several else "set", overflow="fold")
    table.add_column(way, overflow="fold")
    columns = {name: _ERROR_COLUMNS[name] for name in ("recall", "false_positive_rate", "f1")}
    for title in ("items\n(unsafe)", *columns.values(), "failures"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        for part in result.parts[way]:
            metrics = part.metrics
            table.add_row(
                Text(common.printable(f"{result.source}\n{result.guard}" if several else result.source)),
                Text(common.printable(part.name)),
                f"{metrics.items}\n({metrics.unsafe})",
                *(_cell(metrics, part.intervals, name) for name in columns),
                str(metrics.failures),
            )
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each guard that is compared with the first, on each set."""
    table = Table(
        box=SIMPLE_HEAD, padding=_NARROW, title=f"Compared with {comparisons[0].first}", title_justify="left"
    )
    table.add_column("set\nguard", overflow="fold")
    changed = ("F1", "recall", "false\npositives")
    for title in (
        *(f"change of\n{name}" for name in changed),
        "only it\nis right",
        "only the\nother is",
        "p",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for comparison in comparisons:
        difference = comparison.difference
        cells = [
            "-" if change is None else f"{change[0]:+.3f}\n{change[1][0]:+.2f} {change[1][1]:+.2f}"
            for change in difference.changes.values()
        ]
        table.add_row(
            Text(common.printable(f"{comparison.source}\n{comparison.other}")),
            *cells,
            str(difference.only_other),
            str(difference.only_first),
            f"{difference.p_value:.2g}",
        )
    return table


def _cell(metrics: Metrics, intervals: Mapping[str, Interval | None], name: str) -> str:
    """A figure, and below it its interval."""
    figure, interval = getattr(metrics, name), intervals[name]
    if figure is None or interval is None:
        return "-"
    if name in _COST_COLUMNS:
        return f"{figure:.0f}\n{interval[0]:.0f}-{interval[1]:.0f}"
    return f"{figure:.3f}\n{interval[0]:.2f}-{interval[1]:.2f}"
