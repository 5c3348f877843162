"""`rsafe align`: trains a guard on labelled data."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rsafe_plugins.commands import common
from rsafe_plugins.errors import SettingsError

if TYPE_CHECKING:
    from rsafe_plugins.alignment.data import TrainingData, TrainingFile
    from rsafe_plugins.alignment.grpo import GRPO
    from rsafe_plugins.alignment.warm_start import WarmStart
    from rsafe_plugins.evaluation.items import LabelledItem

_WARM_START, _GRPO = "warm-start", "grpo"
_PACKAGES = ("rsafe-plugins", "torch", "transformers", "peft", "trl", "vllm")


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[@COUNT]...")
@click.option("--stage", type=click.Choice([_WARM_START, _GRPO]), required=True, help="The training stage.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for log, adapters and held-out items.",
)
@click.option(
    "--base",
    metavar="PATH",
    help="A GGUF file, or a Hugging Face folder or name. Default: the recipe's, or the embedded model.",
)
@click.option(
    "--adapter",
    metavar="PATH|embedded",
    help="A PEFT adapter's folder, or its GGUF file, to go on from; embedded for the package's. Default: a new one.",
)
@click.option("--template", metavar="PATH", type=click.Path(), help="The wording of the guard's prompt.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train no longer than this.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="warm-start: examples a step, which share a policy; grpo: prompts a step.",
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Its peak.")
@click.option("--rank", type=click.IntRange(min=1), help="Of the LoRA.")
@click.option(
    "--first-layer",
    type=click.IntRange(min=0),
    help="Decoder layers below this one are left as they are, which is faster.",
)
@click.option(
    "--through-policy/--stop-at-policy",
    default=None,
    help="warm-start: whether the gradient runs through the policy part too [default: it does]; a step is a third "
    "faster without.",
)
@click.option(
    "--by-category",
    is_flag=True,
    flag_value=1.0,
    default=None,
    help="warm-start: for the dialect rsafe-by-category, which asks for each category by itself. "
    "--set by_category=0.5 does so in half of the steps.",
)
@click.option(
    "--recipe",
    metavar="NAME|PATH",
    help="A recipe of the package (warm-start: embedded, embedded-categories; grpo: embedded, rsafe-7b), or a YAML "
    "file.",
)
@click.option(
    "--merged", is_flag=True, help="Also write base and adapter as one Hugging Face folder, for vLLM."
)
@click.option("--full", is_flag=True, default=None, help="grpo: train all weights instead of a LoRA.")
@click.option(
    "--rollouts",
    type=click.Choice(["transformers", "vllm"]),
    help="grpo: what samples the completions. [default: transformers]",
)
@click.option(
    "--set",
    "changes",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any setting of a recipe, such as micro_batch=8 or policies.whole=0.5; may be repeated.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Items a file to leave out; they are written to held-out.jsonl.",
)
@click.option("--seed", type=int, help="Of all that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def align(
    files: tuple[str, ...],
    stage: str,
    out: Path,
    adapter: str | None,
    template: str | None,
    recipe: str | None,
    merged: bool,
    changes: tuple[str, ...],
    held_out: int,
    as_json: bool,
    **options: Any,
) -> int:
    """Trains a guard on the labelled items of each FILE, and writes a LoRA adapter for PEFT and llama.cpp.

    FILE@COUNT takes at most COUNT items of a file. The stage warm-start teaches a small base the answer's form,
    the task, and to read the policy it is given. The stage grpo rewards right answers in the right form. A run that
    died goes on where it was when started again with the same options. On several processors or GPUs, start it with
    `torchrun -m rsafe_plugins.cli align`, or `accelerate launch -m rsafe_plugins.cli align`.
    """
    _check_stage(
        stage,
        {
            _GRPO: {"--full": options["full"], "--rollouts": options["rollouts"]},
            _WARM_START: {
                "--through-policy/--stop-at-policy": options["through_policy"] is not None,
                "--by-category": options["by_category"],
            },
        },
    )
    if merged and options["full"]:
        raise click.UsageError("--full trains all weights: there is no adapter to merge.")
    from rsafe_plugins.alignment.data import TrainingFile
    from rsafe_plugins.alignment.recipe import CHECKPOINTS

    # They concern us and not who trains, and would tear the progress bar.
    warnings.filterwarnings("ignore", module=r"(transformers|peft|trl|torch)\.")
    chosen = {**_changes(changes), **{name: value for name, value in options.items() if value is not None}}
    sources = [TrainingFile.parse(text) for text in files]
    if (out / "run.json").exists():
        raise click.UsageError(
            f"A run ended in {out}, and another one there would take its place: name another folder with --out."
        )
    for other, checkpoint in CHECKPOINTS.items():
        if other != stage and any(out.glob(checkpoint)):
            raise click.UsageError(
                f"A run of the stage {other} died in {out}: start that again, or name another folder with --out."
            )
    job = _Job(sources, held_out, out, _adapter(adapter), template)
    try:
        run = _warm_start if stage == _WARM_START else _grpo
        report, finish = run(job, recipe, chosen)
        if report is not None and merged:
            report["merged"] = _merged(report, out)
    except ImportError as error:
        raise click.UsageError(f'Training needs {error.name}: pip install "rsafe-plugins[align]".') from error
    if report is None:
        return 0
    report = {
        "stage": stage,
        "recipe": recipe,
        **report,
        "from_adapter": adapter,
        "template": template,
        "versions": _versions(),
    }
    (out / "run.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    finish()
    if as_json:
        common.print_json(report)
    else:
        common.console().print(_summary(report))
    return 0


def _adapter(name: str | None) -> Path | None:
    """Where the adapter is that training goes on from."""
    if name is None:
        return None
    from rsafe_plugins.backends.weights import PACKAGED_ADAPTER

    path = PACKAGED_ADAPTER if name == "embedded" else Path(name)
    if not path.exists():
        raise click.UsageError(
            f"--adapter takes an adapter's folder or GGUF file, or embedded, and there is no {path}."
        )
    return path


def _check_stage(stage: str, options: dict[str, dict[str, Any]]) -> None:
    """Refuses options that the stage has no use for."""
    for needed, values in options.items():
        given = [name for name, value in values.items() if value]
        if stage != needed and given:
            raise click.UsageError(f"{given[0]} is for the stage {needed}, and this is {stage}.")


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from `NAME=VALUE`, each value read as YAML."""
    changed: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise click.UsageError(f"Expected --set NAME=VALUE, not {pair!r}.")
        try:
            changed[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"The value of --set {name} can't be read as YAML: {value!r}.") from error
    return changed


@dataclass(frozen=True)
class _Job:
    """What both stages are given."""

    files: list[TrainingFile]
    held_out: int
    out: Path
    adapter: Path | None
    template: str | None

    def data(self, seed: int) -> TrainingData:
        from rsafe_plugins.alignment.data import read_training_data

        return read_training_data(self.files, self.held_out, seed)

    def record(self) -> dict[str, Any]:
        """What the data was, and the adapter that training goes on from."""
        return {
            "files": [
                str(file.path) if file.take is None else f"{file.path}@{file.take}" for file in self.files
            ],
            "sha256": [_sha256(file.path) for file in self.files],
            "held_out": self.held_out,
            "from_adapter_sha256": _adapter_sha256(self.adapter),
        }

    def write_held_out(self, items: Iterable[LabelledItem]) -> None:
        lines = "".join(item.model_dump_json() + "\n" for item in items)
        (self.out / "held-out.jsonl").write_text(lines, "utf-8")


_Ran = tuple[dict[str, Any] | None, Callable[[], None]]
"""What to report, from the first process only, and what is to be done once that is written."""


def _warm_start(job: _Job, recipe: str | None, options: dict[str, Any]) -> _Ran:
    from rsafe_plugins.alignment.recipe import WarmStartSettings, load_recipe

    settings = load_recipe(WarmStartSettings, recipe, options)
    share = settings.by_category
    if share == 1 and job.template:
        raise click.UsageError("by_category=1 has a prompt of its own: leave --template out.")
    data = job.data(settings.seed)
    record = job.record()
    from rsafe_plugins.alignment.by_category import (
        Asker,
        MixedEncoder,
        category_batches,
        category_passes,
        mixed,
    )
    from rsafe_plugins.alignment.categorize import Categorizer
    from rsafe_plugins.alignment.documents import as_documents, injected
    from rsafe_plugins.alignment.examples import batches, category_ids
    from rsafe_plugins.alignment.responses import crossed
    from rsafe_plugins.alignment.warm_start import WarmStart
    from rsafe_plugins.backends.weights import embedded_weights
    from rsafe_plugins.guard.dialects.rsafe_by_category import RSafeByCategory
    from rsafe_plugins.guard.prompt import GuardPrompt

    base = settings.base or str(embedded_weights())
    run = {**record, "template_by_category": RSafeByCategory().prompt.digest}
    stage = WarmStart(base, GuardPrompt(job.template), settings, job.out, run, job.adapter, MixedEncoder)
    items, held_out = (
        [
            *some,
            *as_documents(some, settings.prompts_as_documents, random.Random(settings.seed)),
            *injected(some, settings.injected_documents, random.Random(settings.seed)),
            *crossed(some, settings.crossed_responses, random.Random(settings.seed)),
        ]
        for some in (data.items, data.held_out)
    )
    if stage.rank == 0:
        stage.check_goes_on()
        job.write_held_out(held_out)
    items = list(map(stage.encoder.shortened, items))
    categorizer = Categorizer([*data.items, *data.unused], category_ids)
    drawn: Iterator[tuple[Any, Sequence[Any]]] = batches(
        items,
        settings.batch,
        settings.seed,
        categorizer,
        policies=settings.policies,
        thoughts=settings.thoughts,
    )
    most = float(len(items))
    if share == 1:
        asker = Asker(items, categorizer)
        answerable = asker.answerable(items)
        most = len(answerable)
        drawn = category_batches(answerable, settings.batch, settings.seed, asker)
    elif share > 0:
        known = Asker(items, categorizer).of_known_category(items)
        if not known:
            raise SettingsError(
                "by_category needs unsafe prompts or responses that name their category: set it to 0."
            )
        asked = category_passes(known, settings.batch, settings.seed, Asker(known, categorizer))
        most /= 1 - share
        drawn = mixed(drawn, asked, share, settings.seed)
    total = int(min(math.ceil(most), settings.items or math.inf))
    with _progress(shown=stage.rank == 0) as progress:
        bar = progress.add_task(_WARM_START, total=total, figure="")
        stage.train(
            drawn,
            total,
            lambda seen, loss: progress.update(bar, completed=seen, figure=f"loss {loss:.3f}"),
        )
    _check_trained(stage)
    folder = stage.save()
    if stage.rank > 0:
        return None, stage.finish
    rows = stage.log.rows
    report = {
        **record,
        "items": rows[-1]["seen"],
        "settings": settings.model_dump(mode="json"),
        "base": base,
        "minutes": round(rows[-1]["minutes"], 1),
        "last_loss": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
        "machine": _machine(stage.device.type, stage.processes),
        "adapter": str(folder),
        **_exported(folder, stage.base_config, job.out, _WARM_START),
    }
    return report, stage.finish


def _grpo(job: _Job, recipe: str | None, options: dict[str, Any]) -> _Ran:
    from rsafe_plugins.alignment.recipe import GRPOSettings, load_recipe

    settings = load_recipe(GRPOSettings, recipe, options)
    if settings.full and job.adapter is not None and not job.adapter.is_dir():
        raise click.UsageError(
            "With --full the adapter is added to the weights: give the folder of a PEFT adapter."
        )
    data = job.data(settings.seed)
    record = job.record()
    from rsafe_plugins.alignment.grpo import GRPO
    from rsafe_plugins.backends.weights import embedded_weights
    from rsafe_plugins.guard.prompt import GuardPrompt

    base = settings.base or str(embedded_weights())
    stage = GRPO(
        base,
        GuardPrompt(job.template),
        settings,
        data.items,
        data.held_out,
        job.out,
        record,
        job.adapter,
    )
    if stage.rank == 0:
        stage.check_goes_on()
        job.write_held_out(data.held_out)
    with _progress(shown=stage.rank == 0) as progress:
        bar = progress.add_task(_GRPO, total=stage.steps, figure="")
        stage.train(lambda step, reward: progress.update(bar, completed=step, figure=f"reward {reward:.3f}"))
    _check_trained(stage)
    folder = stage.save()
    if stage.rank > 0:
        return None, stage.finish
    rows = stage.log.rows
    measured = [row for row in rows if "held_out_accuracy" in row]
    report = {
        **record,
        "settings": settings.model_dump(mode="json"),
        "base": base,
        "steps": len(rows),
        "minutes": round(rows[-1]["minutes"], 1),
        "reward": sum(row["reward"] for row in rows[-10:]) / len(rows[-10:]),
        "held_out_before": (_held_out(rows[0], "before_") or _held_out(measured[0])) if measured else None,
        "held_out_after": _held_out(measured[-1]) if measured else None,
        "machine": _machine(stage.device.type, stage.processes),
    }
    if settings.full:
        return {**report, "model": str(folder)}, stage.finish
    exported = _exported(folder, stage.base_config, job.out, _GRPO)
    return {**report, "adapter": str(folder), **exported}, stage.finish


def _check_trained(stage: WarmStart | GRPO) -> None:
    """Refuses to call that an adapter which no step has trained; only the first process knows the steps."""
    if stage.rank == 0 and not stage.log.rows:
        raise SettingsError("The time was up before the first step: give it more minutes, or none.")


def _machine(device: str, processes: int) -> str:
    return f"{platform.machine()}, {device}" + (f", {processes} processes" if processes > 1 else "")


def _held_out(row: dict[str, float], which: str = "") -> dict[str, float]:
    begin = f"{which}held_out_"
    return {name.removeprefix(begin): row[name] for name in row if name.startswith(begin)}


def _exported(adapter: Path, base_config: Mapping[str, Any], out: Path, stage: str) -> dict[str, Any]:
    """The adapter's file for llama.cpp; None, and said, where it can't be written: what was trained is there."""
    from rsafe_plugins.alignment.export import ExportError, export_gguf

    try:
        gguf = export_gguf(adapter, base_config, out / "guard-adapter.gguf", name=f"rsafe {stage}")
    except ExportError as error:
        click.echo(f"No file for llama.cpp was written: {error}", err=True)
        return {"gguf": None}
    return {"gguf": str(gguf), "gguf_bytes": gguf.stat().st_size}


def _adapter_sha256(adapter: Path | None) -> str | None:
    """Of the weights in an adapter's file or folder; None where there are none."""
    file = adapter / "adapter_model.safetensors" if adapter is not None and adapter.is_dir() else adapter
    return _sha256(file) if file is not None and file.is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _merged(report: Mapping[str, Any], out: Path) -> str:
    from rsafe_plugins.alignment.export import export_merged

    return str(export_merged(report["adapter"], report["base"], out / "merged"))


def _summary(report: dict[str, Any]) -> str:
    if report["stage"] == _WARM_START:
        done = f"{report['items']} items in {report['minutes']} minutes, loss {report['last_loss']:.3f}."
    else:
        done = f"{report['steps']} steps in {report['minutes']} minutes, reward {report['reward']:.3f}."
    if "model" in report:
        return f"{done} The model: {report['model']}."
    if report["gguf"] is None:
        return f"{done} The adapter: {report['adapter']}."
    return f"{done} The adapter for llama.cpp: {report['gguf']} ({report['gguf_bytes'] / 2**20:.1f} MiB)."


def _progress(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figure]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
