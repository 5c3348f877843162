"""What is watched while GRPO trains: a line a step, the reasons to stop, and a picture of the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsafe_plugins.alignment.warm_start import AlignmentError

Row = Mapping[str, float]

# How TRL calls what a line of the log holds.
_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "reward": "reward",
    "rewards/format/mean": "format_rate",
    "rewards/accuracy/mean": "accuracy",
    "rewards/length/mean": "length_reward",
    "rewards/adherence/mean": "adherence",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut_off",
    "kl": "kl",
    "entropy": "entropy",
    "groups_alike": "groups_alike",
    "said_safe": "said_safe",
    "said_unsafe": "said_unsafe",
    "is_unsafe": "is_unsafe",
    "step_time": "seconds",
    "held_out_f1": "held_out_f1",
    "held_out_accuracy": "held_out_accuracy",
    "held_out_missed_harm": "held_out_missed_harm",
    "held_out_false_positives": "held_out_false_positives",
    "held_out_format_rate": "held_out_format_rate",
    "held_out_tokens": "held_out_tokens",
}
_PANELS = {
    "Reward": ("reward",),
    "Training: rates": ("accuracy", "format_rate", "adherence"),
    "Tokens a completion": ("tokens",),
    "KL divergence from the start": ("kl",),
    "Held out: errors": ("held_out_missed_harm", "held_out_false_positives"),
    "Held out: rates": ("held_out_accuracy", "held_out_f1", "held_out_format_rate"),
}
_SMOOTHED = 10  # steps that a drawn mean runs over


def log_row(step: int, minutes: float, logs: Mapping[str, float]) -> dict[str, float]:
    """A line of the log from what TRL logs at a step.

    Args:
        step: The step, counted from 1.
        minutes: How long training has taken.
        logs: TRL's names and values; what this log doesn't know is left out.
    """
    known = {ours: float(logs[theirs]) for theirs, ours in _NAMES.items() if theirs in logs}
    return {"step": step, "minutes": round(minutes, 3), **known}


def check_rows(rows: Sequence[Row], window: int) -> None:
    """Whether training can go on.

    Args:
        rows: The log so far, at least one line.
        window: How many steps in a row may bring no verdict, or verdicts of one label only while the items have both.

    Raises:
        AlignmentError: The last loss or gradient is no finite number, or the guard has collapsed.
    """
    last = rows[-1]
    for name in ("loss", "grad_norm"):
        if not math.isfinite(last.get(name, 0.0)):
            raise AlignmentError(
                f"The {name} at step {last['step']:.0f} is {last[name]}: lower the learning rate "
                f"(now {last['learning_rate']:.1e}), and go on from a checkpoint or an adapter that was good."
            )
    recent = rows[-window:]
    if len(recent) < window:
        return
    if not any(row["format_rate"] for row in recent):
        raise AlignmentError(
            f"No completion of the last {window} steps held a verdict in the form, so there is nothing to learn from: "
            "begin with the stage warm-start, or raise max_tokens."
        )
    asked_for_both = 0 < sum(row["is_unsafe"] for row in recent) < window
    for label, name in (("safe", "said_unsafe"), ("unsafe", "said_safe")):
        if asked_for_both and not any(row[name] for row in recent):
            raise AlignmentError(
                f"All verdicts of the last {window} steps were {label}, and the items have both labels: the guard has "
                "collapsed; lower the learning rate, raise kl, or balance the data."
            )


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Draws what of the log there is, a panel for each group of curves, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            if name.startswith("held_out"):
                axes.plot(steps, values, marker="o", markersize=3, label=_spoken(name))
                continue
            (line,) = axes.plot(steps, _running_mean(values), label=_spoken(name))
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.set_ylim(-0.02, 1.02)
            if axes.lines:
                axes.legend(fontsize=7)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _spoken(name: str) -> str:
    return name.removeprefix("held_out_").replace("_", " ")


def _running_mean(values: Sequence[float]) -> list[float]:
    parts = [values[max(0, end - _SMOOTHED) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]
