"""Whether an answer that NeMo streams in chunks is judged as it would be as a whole.

Takes labelled files of responses, as `rsafe eval` does; 60 of their items are judged by the embedded guard. NeMo's own
buffer makes the chunks.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from nemoguardrails.rails.llm.buffer import get_buffer_strategy
from nemoguardrails.rails.llm.config import OutputRailsStreamingConfig

from benchmarks.record import Part, sound
from rsafe_plugins import Content, Guard
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.evaluation.run import sample

ITEMS = 60
SIZES = (50, 200, 800)


async def chunks(text: str, size: int) -> list[str]:
    """What NeMo's output rail is given of a streamed text; words stand for the model's tokens."""

    async def words() -> AsyncIterator[str]:
        for word in re.findall(r"\s*\S+\s*$|\s*\S+", text):
            yield word

    config = OutputRailsStreamingConfig(enabled=True, chunk_size=size, context_size=min(50, size // 2))
    strategy = get_buffer_strategy(config)
    return [strategy.format_chunks(batch.processing_context) async for batch in strategy(words())]


def blocked(guard: Guard, items: Sequence[LabelledItem], size: int) -> list[bool]:
    """For each item whether one of its chunks is blocked."""
    pieces = [asyncio.run(chunks(item.response, size)) for item in items]
    contents = [
        Content.response(piece, item.prompt)
        for item, of_it in zip(items, pieces, strict=True)
        for piece in of_it
    ]
    verdicts = guard.check_many(contents)
    sound(verdicts)
    remaining = iter(verdicts)
    return [any([next(remaining).blocked for _ in of_it]) for of_it in pieces]


def percent(part: Sequence[bool]) -> float:
    return 100 * sum(part) / len(part)


def main() -> None:
    read = [item for name in sys.argv[1:] for item in read_items(Path(name)) if item.task == "response"]
    items = sample(read, ITEMS)
    guard = Guard(backend="embedded", reasoning="never", timeout=600)
    part = Part("streaming", f"{len(items)} answers judged as a whole, and as NeMo streams them")
    verdicts = guard.check_many([item.content() for item in items])
    sound(verdicts)
    whole = [verdict.blocked for verdict in verdicts]
    right = [verdict.blocked == item.unsafe for item, verdict in zip(items, verdicts, strict=True)]
    part.add("as a whole: right", percent(right), "%")
    for size in SIZES:
        found = blocked(guard, items, size)
        pairs = list(zip(whole, found, strict=True))
        part.add(f"chunks of {size}: same as the whole", percent([one == other for one, other in pairs]), "%")
        part.add(
            f"chunks of {size}: blocked, the whole not",
            percent([not one and other for one, other in pairs]),
            "%",
        )
        part.add(
            f"chunks of {size}: passed, the whole not",
            percent([one and not other for one, other in pairs]),
            "%",
        )
        right = [one == item.unsafe for item, one in zip(items, found, strict=True)]
        part.add(f"chunks of {size}: right", percent(right), "%")
    part.save()


if __name__ == "__main__":
    main()
