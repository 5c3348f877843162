"""Speed and memory of the embedded guard on this machine: `make bench`.

Cold starts are processes of their own. All other figures come from one process, whose guards share its engine.
"""

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rsafe_plugins import Content, Guard, Verdict
from rsafe_plugins.backends import LlamaCppBackend
from rsafe_plugins.backends.weights import cache_folder

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


def cold_start() -> float:
    """Seconds from the start of a new interpreter to the end of its first check."""
    code = (
        "from rsafe_plugins import Guard; "
        "v = Guard(backend='embedded', reasoning='never').check('How do I bake bread?'); "
        "raise SystemExit(v.error)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def resident_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def show(name: str, value: str) -> None:
    print(f"{name:<52}{value:>10}", flush=True)


def main() -> None:
    contents = prompts()
    cold_start()  # fetches the weights and merges the adapter into them, where that hasn't been done
    for saved in (cache_folder() / "prefixes").glob("*.prefix"):
        saved.unlink()
    show("cold start to the first verdict, of a new policy", f"{cold_start():.2f} s")
    show("the same later, median of 3", f"{statistics.median(cold_start() for _ in range(3)):.2f} s")
    guard = Guard(backend="embedded", reasoning="never")
    sound(guard.check(contents[0]))
    times = seconds_each(guard, contents)
    show(f"one verdict without reasoning, median of {len(times)}", f"{statistics.median(times):.2f} s")
    show("the slowest of them", f"{max(times):.2f} s")
    started = time.perf_counter()
    for verdict in guard.check_many(contents):
        sound(verdict)
    show("as one batch", f"{len(contents) / (time.perf_counter() - started):.1f} /s")
    show("memory, peak", f"{resident_megabytes():.0f} MB")
    backend = LlamaCppBackend(flash_attention=True)
    attentive = Guard(backend=backend, reasoning="never")
    sound(attentive.check(contents[0]))
    times = seconds_each(attentive, contents)
    show(f"the same with flash attention, median of {len(times)}", f"{statistics.median(times):.2f} s")
    asyncio.run(backend.aclose())
    for reasoning in ("adaptive", "always"):
        times = seconds_each(Guard(backend="embedded", reasoning=reasoning), contents[:8])
        show(
            f"one verdict, reasoning={reasoning}, median of {len(times)}", f"{statistics.median(times):.2f} s"
        )
    print(f"({os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
