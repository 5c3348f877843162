"""Speed and memory of the embedded guard on this machine.

Cold starts are processes of their own. All other figures come from one process, whose guards share its engine. What is
blocked is named in one row alone: the others measure verdicts.
"""

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from benchmarks.record import Part, demo_items, sound
from benchmarks.weights import percent_cached
from rsafe_plugins import Content, Guard, Policy, Verdict
from rsafe_plugins.backends import LlamaCppBackend
from rsafe_plugins.backends.weights import cache_folder, embedded_weights


def seconds_each(guard: Guard, contents: Sequence[Content]) -> list[float]:
    times = []
    for content in contents:
        started = time.perf_counter()
        verdict = guard.check(content)
        times.append(time.perf_counter() - started)
        sound([verdict])
    return times


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


def megabytes() -> float:
    return psutil.Process().memory_info().rss / 1e6


def main() -> None:
    part = Part("embedded", "The embedded guard")
    contents = [Content.prompt(text) for text in demo_items("prompt")]
    cold_start()  # fetches the weights and merges the adapter into them, where that hasn't been done
    for saved in (cache_folder() / "prefixes").glob("*.prefix"):
        saved.unlink()
    part.add("cold start to the first verdict, of a new policy", cold_start(), "s", 4)
    later = statistics.median(cold_start() for _ in range(3))
    part.add("the same of a policy seen before, median of 3", later, "s", 4)

    guard = Guard(backend="embedded", reasoning="never", name_categories=False)
    sound([guard.check(contents[0])])
    times = seconds_each(guard, contents)
    part.add(f"one verdict without reasoning, median of {len(times)}", statistics.median(times), "s", 0.4)
    part.add("the slowest of them", max(times), "s")
    # From so little on everything is unsafe, so that all are named.
    blocking = Guard(backend="embedded", reasoning="never", threshold=1e-9)
    sound([blocking.check(contents[0])])
    part.add(
        "the same, if unsafe and named, median", statistics.median(seconds_each(blocking, contents)), "s"
    )
    few = Policy(name="few", categories=Policy.load("rsafe-18").categories[:4])
    comparing = Guard(few, backend="embedded", reasoning="never", threshold=1e-9, category_threshold=0.5)
    sound([comparing.check(contents[0])])
    times = seconds_each(comparing, contents)
    part.add("the same, if unsafe under a policy of 4 categories, median", statistics.median(times), "s")
    part.add("memory at rest", megabytes(), "MB", 700)

    started = time.perf_counter()
    verdicts = guard.check_many(contents)
    part.add("a list, without reasoning", len(contents) / (time.perf_counter() - started), "checks/s")
    sound(verdicts)
    texts = [f"{content.text} ({number})" for number in range(24) for content in contents]
    many = [Content.prompt(text) for text in texts[:500]]
    started = time.perf_counter()
    patient = Guard(backend="embedded", reasoning="never", name_categories=False, timeout=1200)
    sound(asyncio.run(all_at_once(patient, many)))
    part.add("500 checks at once", len(many) / (time.perf_counter() - started), "checks/s")
    part.add("memory after them", megabytes(), "MB", 700)

    backend = LlamaCppBackend(flash_attention=True)
    attentive = Guard(backend=backend, reasoning="never", name_categories=False)
    sound([attentive.check(contents[0])])
    times = seconds_each(attentive, contents)
    part.add(f"one verdict with flash attention, median of {len(times)}", statistics.median(times), "s")
    asyncio.run(backend.aclose())
    # Only now: it takes more memory than all that was measured.
    from transformers import AutoTokenizer

    weights = embedded_weights()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    # It asks once a check, since it finds nothing unsafe of which it would name the categories.
    harmless = Guard(backend="embedded", reasoning="never", threshold=1.0)
    verdicts = [harmless.check(content) for content in contents]
    sound(verdicts)
    part.add(
        "policy tokens from the prefix cache",
        percent_cached(verdicts, tokenizer, guard, contents[0]),
        "%",
        95,
        more=True,
    )
    part.save()


async def all_at_once(guard: Guard, contents: Sequence[Content]) -> list[Verdict]:
    return await asyncio.gather(*map(guard.acheck, contents))


if __name__ == "__main__":
    main()
