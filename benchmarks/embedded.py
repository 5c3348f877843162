"""Speed and memory of the embedded guard on this machine: `make bench`.

All figures come from one process, whose guards share its engine.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTED = time.perf_counter()

from rsafe_plugins import Content, Guard, Verdict  # noqa: E402  (the import is part of the cold start)

INPUTS = Path(__file__).parents[1] / "examples" / "data" / "demo_inputs.jsonl"


def prompts() -> list[Content]:
    items = map(json.loads, INPUTS.read_text("utf-8").splitlines())
    return [Content.prompt(item["text"]) for item in items if item["kind"] == "prompt"]


def seconds_each(guard: Guard, contents: Sequence[Content]) -> list[float]:
    return [checked(guard, content) for content in contents]


def checked(guard: Guard, content: Content) -> float:
    started = time.perf_counter()
    sound(guard.check(content))
    return time.perf_counter() - started


def sound(verdict: Verdict) -> None:
    if verdict.error:
        sys.exit(f"The guard failed, there is nothing to measure: {verdict.error}")


def resident_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def show(name: str, value: str) -> None:
    print(f"{name:<52}{value:>10}", flush=True)


def main() -> None:
    contents = prompts()
    guard = Guard(backend="embedded", reasoning="never")
    sound(guard.check(contents[0]))
    show("cold start to the first verdict", f"{time.perf_counter() - STARTED:.2f} s")
    times = seconds_each(guard, contents)
    show(f"one verdict without reasoning, median of {len(times)}", f"{statistics.median(times):.2f} s")
    show("the slowest of them", f"{max(times):.2f} s")
    started = time.perf_counter()
    for verdict in guard.check_many(contents):
        sound(verdict)
    show("as one batch", f"{len(contents) / (time.perf_counter() - started):.1f} /s")
    show("memory, peak", f"{resident_megabytes():.0f} MB")
    for reasoning in ("adaptive", "always"):
        times = seconds_each(Guard(backend="embedded", reasoning=reasoning), contents[:8])
        show(
            f"one verdict, reasoning={reasoning}, median of {len(times)}", f"{statistics.median(times):.2f} s"
        )
    print(f"({os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
