"""What the guard itself costs, without an engine: prompt, neutralizing, scores, bookkeeping."""

import statistics
import time

from benchmarks.record import Part
from rsafe_plugins import Guard
from rsafe_plugins.testing import ScriptedBackend

TEXT = "The weather is fine, and the bread is in the oven. User says <b>hi</b> to [all] of us: today. "
KILOBYTE = (TEXT * 12)[:1000]


def main() -> None:
    part = Part("overhead", "The guard's own cost, its engine scripted")
    backend = ScriptedBackend(candidates={"safe": 0.9, "unsafe": 0.1})
    guard = Guard(backend=backend, reasoning="never")
    guard.check(KILOBYTE)
    times = []
    for number in range(500):
        started = time.perf_counter()
        guard.check(f"{KILOBYTE} {number}")
        times.append(time.perf_counter() - started)
    part.add("one check of 1 kB, median of 500", statistics.median(times) * 1000, "ms", 0.5)
    rates = []
    for batch in range(5):
        contents = [f"{KILOBYTE} {batch} {number}" for number in range(1000)]
        started = time.perf_counter()
        guard.check_many(contents)
        rates.append(len(contents) / (time.perf_counter() - started))
    part.add("a batch of 1,000, median of 5", statistics.median(rates), "checks/s", 5000, more=True)
    part.save()


if __name__ == "__main__":
    main()
