"""Parts of a text that is too long for the engine's context."""

from __future__ import annotations

import re

Span = tuple[int, int]

OVERLAP = 200
"""Characters that neighbouring parts share, so that nothing hides in a cut."""

MOST_PARTS = 64
MOST_CHARACTERS = 1_000_000

_SHORTEST = 4 * OVERLAP
_SENTENCE_END = re.compile(r"[.!?\n\u3002\uff01\uff1f]\s*")
_SPACE = re.compile(r"\s")


def halves(text: str, span: Span) -> tuple[Span, Span] | None:
    """Cuts a part of a text in two that overlap, at the end of a sentence where one is near the middle.

    Args:
        text: The whole text.
        span: Start and end of the part, in characters.

    Returns:
        The two parts, or None where it is too short to be cut.
    """
    start, end = span
    length = end - start
    if length < _SHORTEST:
        return None
    middle = start + length // 2
    cut = _nearest(text, middle, length // 8)
    return (start, min(end, cut + OVERLAP // 2)), (max(start, cut - OVERLAP // 2), end)


def _nearest(text: str, middle: int, reach: int) -> int:
    for pattern in (_SENTENCE_END, _SPACE):
        ends = [found.end() for found in pattern.finditer(text, middle - reach, middle + reach)]
        if ends:
            return min(ends, key=lambda end: abs(end - middle))
    return middle
