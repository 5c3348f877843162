"""What GRPO asks: each item under a policy of its own, hard pairs, and the order in which items are drawn."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch.utils.data import Sampler

from rsafe_plugins.alignment.examples import (
    PolicyVariant,
    category_ids,
    injection_variant,
    label_under,
    packaged,
    policy_variant,
)
from rsafe_plugins.alignment.recipe import PolicyMix
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.verdict import Label
from rsafe_plugins.policy import Policy

_TRIES = 20  # policies drawn for an item before it gets one that always fits
_DROPPED = 3  # categories at most that both sides of a pair lack, so that a gap in the ids says nothing
_LAG = 2  # steps until what came of a step counts: a data loader draws one step ahead


@dataclass(frozen=True, slots=True)
class Draw:
    """An item under a policy.

    Attributes:
        item: The item's index.
        policy: The policy that it is judged by.
        label: What it is under that policy.
        pair: What it shares with the other side of its pair alone; empty where it has none.
    """

    item: int
    policy: Policy
    label: Label
    pair: str


class Draws:
    """All that can be drawn of some items. A draw depends on the seed, its pass and its item alone.

    Args:
        items: Labelled items.
        mix: How policies are drawn.
        paired: Whether unsafe items of known category are drawn as pairs.
        seed: The same seed gives the same draws.

    Raises:
        DataError: An item names categories that nobody knows, or no item can be paired.
    """

    def __init__(self, items: Sequence[LabelledItem], mix: PolicyMix, *, paired: bool, seed: int) -> None:
        strange = [
            item
            for item in items
            if item.unsafe and item.task != "document" and item.categories and not category_ids(item)
        ]
        if strange:
            raise DataError(
                f"The unsafe item {strange[0].id} has the category {strange[0].categories[0]!r}, which is unknown "
                f"(so have {len(strange) - 1} more): expected a name or id of rsafe-18 or an alias of wordings.yaml; "
                "rename it, or leave categories out."
            )
        self.items = items
        self._mix = mix
        self._seed = seed
        most = len(packaged("rsafe-18").categories) - 2  # some must be left for both sides
        self._paired = [
            paired and item.unsafe and item.task != "document" and 0 < len(category_ids(item)) <= most
            for item in items
        ]
        if paired and not any(self._paired):
            raise DataError(
                f"Pairs need unsafe items that name their category, and none of the {len(items)} items does."
            )
        self._drawn = lru_cache(maxsize=256)(self._draw)

    def __len__(self) -> int:
        """Prompts of one pass."""
        return len(self.items) + sum(self._paired)

    def sides(self, item: int) -> int:
        """How many prompts the item makes: 2 for a pair, else 1."""
        return 2 if self._paired[item] else 1

    def draw(self, epoch: int, item: int) -> tuple[Draw, ...]:
        """The item's one or two prompts in that pass, counted from 0."""
        return self._drawn(epoch, item)

    def _draw(self, epoch: int, index: int) -> tuple[Draw, ...]:
        item, chance = self.items[index], random.Random(f"{self._seed}/{epoch}/{index}")
        if item.task == "document":
            return (Draw(index, injection_variant().policy, item.label, ""),)
        if self._paired[index]:
            sides = _pair(item, self._mix, chance)
            pair = f"{epoch}/{index}"
            return tuple(
                Draw(index, variant.policy, label, pair)
                for variant, label in zip(sides, _LABELS_OF_A_PAIR, strict=True)
            )
        variant, label = _single(item, self._mix, chance)
        return (Draw(index, variant.policy, label, ""),)


_LABELS_OF_A_PAIR: tuple[Label, Label] = ("unsafe", "safe")


def _single(item: LabelledItem, mix: PolicyMix, chance: random.Random) -> tuple[PolicyVariant, Label]:
    """A policy under which it is known what the item is, and what that is."""
    for _ in range(_TRIES):
        variant = policy_variant(chance, mix)
        label = label_under(item, variant)
        if label is not None:
            return variant, label
    return policy_variant(chance, PolicyMix(whole=1.0)), item.label


def _pair(item: LabelledItem, mix: PolicyMix, chance: random.Random) -> tuple[PolicyVariant, PolicyVariant]:
    """A policy with the item's categories, and the same without them."""
    ids = category_ids(item)
    for _ in range(_TRIES):
        variant = policy_variant(chance, mix)
        if ids[0] in variant.ids and len(_others(variant, ids)) > 1:
            break
    else:
        variant = policy_variant(chance, PolicyMix(whole=1.0))
    others = _others(variant, ids)
    dropped = chance.sample(others, chance.randint(1, min(_DROPPED, len(others) - 1)))
    with_them = variant.without(dropped)
    return with_them, with_them.without(ids)


def _others(variant: PolicyVariant, ids: Collection[str]) -> list[str]:
    return [one for one in variant.ids if one not in ids]


class DrawSampler(Sampler[int]):
    """Indices of prompts, a step's after the other's; pass after pass over the shuffled items.

    An index is `(pass * items + item) * 2 + side`. The order depends on the arguments alone, so that a run that is
    taken up again with the history of the one that died goes on in the same order.

    Args:
        draws: What is drawn.
        batch: Prompts a step.
        steps: How many steps there are.
        group_size: How often each prompt of a step is repeated, next to each other.
        copies: How often the step is repeated as a whole, as TRL wants it for each part of the gradient.
        seed: The same seed gives the same order.
        solved: For each step that is over, the items whose completions were all right. They sit out the next pass
            that begins. Filled while training; None for no such thing.
    """

    def __init__(
        self,
        draws: Draws,
        *,
        batch: int,
        steps: int,
        group_size: int,
        copies: int,
        seed: int,
        solved: Mapping[int, Collection[int]] | None,
    ) -> None:
        self._draws = draws
        self._batch = batch
        self._steps = steps
        self._group_size = group_size
        self._copies = copies
        self._seed = seed
        self._solved = solved

    def __len__(self) -> int:
        return self._steps * self._batch * self._group_size * self._copies

    def __iter__(self) -> Iterator[int]:
        for rows in self.prompts():
            for _ in range(self._copies):
                for row in rows:
                    yield from [row] * self._group_size

    def prompts(self) -> Iterator[list[int]]:
        """The prompts of each step, pairs first and side by side."""
        epoch = -1
        waiting: deque[tuple[int, int]] = deque()
        resting: set[int] = set()
        for step in range(self._steps):
            if self._solved is not None:
                resting.update(self._solved.get(step - _LAG, ()))
            pairs: list[int] = []
            singles: list[int] = []
            while (free := self._batch - len(pairs) - len(singles)) > 0:
                place = self._fitting(waiting, free)
                if place is None:
                    epoch += 1
                    waiting.extend((epoch, item) for item in self._order(epoch) if item not in resting)
                    resting.clear()
                    continue
                drawn = waiting[place]
                del waiting[place]
                rows = self._rows(*drawn)
                (pairs if len(rows) == 2 else singles).extend(rows)
            yield pairs + singles

    def _fitting(self, waiting: Sequence[tuple[int, int]], free: int) -> int | None:
        """The place of the first that waits and fits; None where the next pass has to begin."""
        return next(
            (place for place, (_, item) in enumerate(waiting) if self._draws.sides(item) <= free), None
        )

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._draws.items)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def _rows(self, epoch: int, item: int) -> list[int]:
        first = (epoch * len(self._draws.items) + item) * 2
        return [first + side for side in range(self._draws.sides(item))]


def place_of(row: int, items: int) -> tuple[int, int, int]:
    """Pass, item and side of a sampler's index."""
    before, side = divmod(row, 2)
    return *divmod(before, items), side
