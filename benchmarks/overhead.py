"""What the guard itself costs, without an engine: prompt, neutralizing, scores, bookkeeping. Part of `make bench`."""

import statistics
import time

from rsafe_plugins import Guard
from rsafe_plugins.testing import ScriptedBackend

TEXT = "The weather is fine, and the bread is in the oven. User says <b>hi</b> to [all] of us: today. "
KILOBYTE = (TEXT * 12)[:1000]


def main() -> None:
    backend = ScriptedBackend(candidates={"safe": 0.9, "unsafe": 0.1})
    guard = Guard(backend=backend, reasoning="never")
    guard.check(KILOBYTE)
    times = []
    for number in range(500):
        started = time.perf_counter()
        guard.check(f"{KILOBYTE} {number}")
        times.append(time.perf_counter() - started)
    print(f"{'own cost of one check of 1 kB, median of 500':<52}{statistics.median(times) * 1000:>7.2f} ms")
    rates = []
    for batch in range(5):
        contents = [f"{KILOBYTE} {batch} {number}" for number in range(1000)]
        started = time.perf_counter()
        guard.check_many(contents)
        rates.append(len(contents) / (time.perf_counter() - started))
    print(f"{'own cost of a batch of 1,000, median of 5':<52}{statistics.median(rates):>7.0f} /s")


if __name__ == "__main__":
    main()
