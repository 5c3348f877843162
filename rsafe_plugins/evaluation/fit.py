"""Fits the threshold, and the band in which thinking pays, from labelled items judged without and with a thought."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard import Verdict

LARGEST_SHARE = 1 / 3
_EDGES = 24  # places tried for each end of the band
_ALIKE = 0.005  # F1 that a simpler choice may cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was fitted, and what it does on the items it was fitted on.

    Attributes:
        threshold: Unsafe from this probability on.
        band: Where adaptive reasoning thinks; both ends are the threshold where thinking doesn't pay.
        never: F1 of bare verdicts.
        always: F1 of verdicts after a thought.
        adaptive: F1 of thinking inside the band alone.
        token_share: Tokens that adaptive generates, as a share of what always does; 0 to 1.
    """

    threshold: float
    band: tuple[float, float]
    never: float
    always: float
    adaptive: float
    token_share: float


@dataclass(frozen=True, slots=True)
class _Row:
    unsafe: bool
    bare: float
    thought: float
    tokens: int


def fit(
    items: Sequence[LabelledItem],
    bare: Sequence[Verdict],
    thought: Sequence[Verdict],
    unsafe_share: float | None = None,
) -> Fit | None:
    """Fits on items and their verdicts without and with a thought, in the same order.

    The threshold is the one with the best F1 of bare verdicts, the middle of those about as good. The band is
    the one with the best F1 among those that cost at most a third of the tokens of always thinking; of bands
    about as good, the cheapest. Items where a check failed are left out.

    Args:
        items: Labelled items.
        bare: Their verdicts without a thought.
        thought: Their verdicts with one.
        unsafe_share: Share of unsafe ones in the traffic that the guard is for, over 0 and under 1: items count
            so much that unsafe ones make up that share of F1. None leaves it at the items' own.

    Returns:
        The fit, or None where one of the labels is missing.
    """
    rows = [
        _Row(item.unsafe, without.score, with_thought.score, with_thought.usage.completion_tokens)
        for item, without, with_thought in zip(items, bare, thought, strict=True)
        if without.score is not None and with_thought.score is not None
    ]
    if len({row.unsafe for row in rows}) < 2:
        return None
    own_share = sum(row.unsafe for row in rows) / len(rows)
    share = own_share if unsafe_share is None else unsafe_share
    # How much a safe item counts where an unsafe one counts 1.
    safe_weight = (1 - share) / share * own_share / (1 - own_share)

    def f1(pairs: Iterable[tuple[bool, bool]]) -> float:
        hits = wrong = 0.0
        for unsafe, called in pairs:
            hits += unsafe and called
            wrong += (unsafe != called) * (1.0 if unsafe else safe_weight)
        return 2 * hits / (2 * hits + wrong) if hits else 0.0

    threshold = _threshold(rows, f1)
    everything = sum(row.tokens for row in rows) or 1

    def judged(band: tuple[float, float]) -> tuple[float, float]:
        inside = [band[0] < band[1] and band[0] <= row.bare <= band[1] for row in rows]
        reached = f1(
            (row.unsafe, (row.thought if thinks else row.bare) >= threshold)
            for row, thinks in zip(rows, inside, strict=True)
        )
        tokens = sum(row.tokens for row, thinks in zip(rows, inside, strict=True) if thinks)
        return reached, tokens / everything

    nothing = (threshold, threshold)
    tried = {band: judged(band) for band in [nothing, *_bands(rows, threshold)]}
    allowed = {band: result for band, result in tried.items() if result[1] <= LARGEST_SHARE}
    best = max(reached for reached, _ in allowed.values())
    band = min((band for band in allowed if allowed[band][0] >= best - _ALIKE), key=lambda b: allowed[b][1])
    return Fit(
        threshold=threshold,
        band=band,
        never=tried[nothing][0],
        always=f1((row.unsafe, row.thought >= threshold) for row in rows),
        adaptive=allowed[band][0],
        token_share=allowed[band][1],
    )


def _threshold(rows: Sequence[_Row], f1: Callable[[Iterable[tuple[bool, bool]]], float]) -> float:
    scores = sorted({row.bare for row in rows})
    middles = [(low + high) / 2 for low, high in pairwise(scores)] or scores
    reached = {middle: f1((row.unsafe, row.bare >= middle) for row in rows) for middle in middles}
    best = max(reached.values())
    good = [middle for middle in middles if reached[middle] >= best - _ALIKE]
    middle = good[len(good) // 2]
    rounded = round(middle, 4)
    reaches = f1((row.unsafe, row.bare >= rounded) for row in rows)
    return rounded if reaches >= reached[middle] else middle


def _bands(rows: Sequence[_Row], threshold: float) -> list[tuple[float, float]]:
    def edges(scores: list[float]) -> list[float]:
        step = max(1, len(scores) // _EDGES)
        return [round(score, 4) for score in scores[::step]]

    below = edges(sorted((row.bare for row in rows if row.bare < threshold), reverse=True))
    above = edges(sorted(row.bare for row in rows if row.bare >= threshold))
    return [(low, high) for low in [*below, threshold] for high in [threshold, *above] if low < high]
