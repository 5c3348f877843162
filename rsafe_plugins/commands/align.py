"""`rsafe align`: trains a guard on labelled data."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rsafe_plugins.commands import common


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE[@COUNT]...")
@click.option("--stage", type=click.Choice(["warm-start"]), required=True, help="The training stage.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for log, adapters and held-out items.",
)
@click.option(
    "--base",
    metavar="PATH",
    help="A GGUF file, or a Hugging Face folder or name. Default: the embedded model.",
)
@click.option(
    "--adapter",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A PEFT adapter to go on from. Default: a new one.",
)
@click.option("--template", metavar="PATH", type=click.Path(), help="The wording of the guard's prompt.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Train no longer than this.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Examples a step; they share a policy.",
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=4e-4, show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of the LoRA.")
@click.option(
    "--first-layer",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decoder layers below this one are left as they are, which is faster.",
)
@click.option(
    "--through-policy/--stop-at-policy",
    default=True,
    show_default=True,
    help="Whether the gradient runs through the policy part too; a step is a third faster without.",
)
@click.option(
    "--held-out",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Items a file to leave out; they are written to held-out.jsonl.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def align(
    files: tuple[str, ...],
    stage: str,
    out: Path,
    base: str | None,
    adapter: Path | None,
    template: str | None,
    minutes: float | None,
    batch: int,
    learning_rate: float,
    rank: int,
    first_layer: int,
    through_policy: bool,
    held_out: int,
    seed: int,
    as_json: bool,
) -> int:
    """Trains a LoRA adapter on the labelled items of each FILE (JSON Lines), and writes it for PEFT and llama.cpp.

    FILE@COUNT takes at most COUNT items of a file. The stage warm-start teaches a small base the answer's form,
    the task, and to read the policy it is given. A run that died goes on where it was when started again with
    the same options. On several processors or GPUs, start it with `torchrun -m rsafe_plugins.cli align`.
    """
    from rsafe_plugins.alignment.data import TrainingFile, read_training_data

    data = read_training_data([TrainingFile.parse(text) for text in files], held_out, seed)
    try:
        from rsafe_plugins.alignment.categorize import Categorizer
        from rsafe_plugins.alignment.examples import batches, category_ids
        from rsafe_plugins.alignment.export import export_gguf
        from rsafe_plugins.alignment.warm_start import WarmStart, WarmStartSettings
    except ImportError as error:
        raise click.UsageError(f'Training needs {error.name}: pip install "rsafe-plugins[align]".') from error
    from rsafe_plugins.backends.weights import embedded_weights
    from rsafe_plugins.guard.prompt import GuardPrompt

    settings = WarmStartSettings(
        rank=rank,
        first_layer=first_layer,
        learning_rate=learning_rate,
        through_policy=through_policy,
        minutes=minutes,
        seed=seed,
    )
    prompt = GuardPrompt(template)
    out.mkdir(parents=True, exist_ok=True)
    run = {"files": list(files), "batch": batch, "held_out": held_out}
    stage_one = WarmStart(base or embedded_weights(), prompt, settings, out, run, adapter)
    if stage_one.rank == 0:
        lines = "".join(item.model_dump_json() + "\n" for item in data.held_out)
        (out / "held-out.jsonl").write_text(lines, "utf-8")
    categorizer = Categorizer([*data.items, *data.unused], category_ids)
    with _progress(shown=stage_one.rank == 0) as progress:
        bar = progress.add_task(stage, total=len(data.items), loss=float("nan"))
        stage_one.train(
            batches(data.items, batch, seed, categorizer),
            len(data.items),
            lambda seen, loss: progress.update(bar, completed=seen, loss=loss),
        )
    folder = stage_one.save()
    if stage_one.rank > 0:
        return 0
    gguf = export_gguf(folder, stage_one.base_config, out / "guard-adapter.gguf", name=f"rsafe {stage}")
    report = {
        "stage": stage,
        "files": list(files),
        "items": stage_one.log.rows[-1]["seen"],
        "batch": batch,
        "settings": asdict(settings),
        "from_adapter": str(adapter) if adapter else None,
        "minutes": round(stage_one.log.rows[-1]["minutes"], 1),
        "last_loss": sum(row["loss"] for row in stage_one.log.rows[-10:]) / len(stage_one.log.rows[-10:]),
        "machine": f"{platform.machine()}, {stage_one.device.type}",
        "adapter": str(folder),
        "gguf": str(gguf),
        "gguf_bytes": gguf.stat().st_size,
    }
    (out / "run.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    if as_json:
        common.print_json(report)
    else:
        common.console().print(
            f"{report['items']} items in {report['minutes']} minutes, loss {report['last_loss']:.3f}. "
            f"The adapter for llama.cpp: {gguf} ({gguf.stat().st_size / 2**20:.1f} MiB)."
        )
    return 0


def _progress(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
