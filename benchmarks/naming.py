"""Whether the embedded guard names what it blocks for, and what that costs: as the model writes it, and as it is asked.

Takes a labelled file as `rsafe eval` does, and the taxonomy of its categories where they aren't in the words of
training data; at most 60 unsafe prompts and responses whose category is known are judged.
"""

from __future__ import annotations

import statistics
import sys
import time

from benchmarks.record import Part, sound
from rsafe_plugins import Guard
from rsafe_plugins.alignment.examples import category_ids
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.run import sample
from rsafe_plugins.policy.taxonomies import corresponding

ITEMS = 60
# The questions are asked where a threshold of categories is fitted; without one the model writes.
WAYS = {"written": {"category_threshold": 0.0}, "asked": {}, "unnamed": {"name_categories": False}}


def right_ids(item: LabelledItem, taxonomy: str | None) -> frozenset[str]:
    """The categories of `rsafe-18` that may be named for an item."""
    if taxonomy is None:
        return frozenset(category_ids(item))
    return frozenset(one for name in item.categories for one in corresponding(name, taxonomy, "rsafe-18"))


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("Expected: python -m benchmarks.naming FILE [TAXONOMY]")
    taxonomy = sys.argv[2] if len(sys.argv) > 2 else None
    read = [item for item in read_items(sys.argv[1]) if item.unsafe and item.task != "document"]
    known = [item for item in read if right_ids(item, taxonomy)]
    if not known:
        sys.exit("Expected unsafe prompts or responses with categories that are known.")
    items = sample(known, ITEMS)
    part = Part("naming", f"What is blocked, by its category, {len(items)} unsafe items")
    for way, settings in WAYS.items():
        guard = Guard(backend="embedded", reasoning="never", **settings)
        sound([guard.check("Hello")])
        times, named, right = [], [], []
        for item in items:
            started = time.perf_counter()
            verdict = guard.check(item.content())
            seconds = time.perf_counter() - started
            sound([verdict])
            if verdict.blocked:
                times.append(seconds)
                named.append(len(verdict.categories) + len(verdict.unknown_categories))
                right.append(bool(right_ids(item, taxonomy).intersection(verdict.categories)))
        if not times:
            sys.exit("Nothing of this is blocked.")
        part.add(f"{way}: median of {len(times)} blocked", statistics.median(times), "s")
        if way != "unnamed":
            part.add(f"{way}: a category is right", 100 * statistics.mean(right), "%")
            part.add(f"{way}: categories named, on average", statistics.mean(named))
    part.save()


if __name__ == "__main__":
    main()
