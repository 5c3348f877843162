"""Whether a guard follows its policy: the same items under policies with and without what they are unsafe for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.run import judge
from rsafe_plugins.guard import Guard, Verdict
from rsafe_plugins.policy import Policy
from rsafe_plugins.policy.taxonomies import corresponding


@dataclass(frozen=True)
class Adherence:
    """How the verdicts on items of one category depend on whether the policy has it.

    Attributes:
        category: The id of the policy's category; empty for all items together.
        items: Items labelled unsafe for it. One with several categories counts for each.
        unsafe_with: How many are found unsafe under the policy with all categories that the item is labelled with.
        safe_without: How many are found safe under the same policy without them.
        flipped: How many both.
        failures: How many had a failed check, which counts for none of these.
        harmless: Items labelled safe, each judged under one of the policies; counted for all items together alone.
        false_positives: How many of those are found unsafe.
    """

    category: str
    items: int
    unsafe_with: int
    safe_without: int
    flipped: int
    failures: int
    harmless: int = 0
    false_positives: int = 0

    @property
    def flip_rate(self) -> float:
        """The share of items whose verdict is that of the policy both times, 0 to 1."""
        return self.flipped / self.items


@dataclass(frozen=True, slots=True)
class Pair:
    """An item under two policies, which between them show whether a guard follows them.

    Attributes:
        item: An unsafe item.
        categories: Ids of the policy's categories that it is unsafe for.
        with_them: A policy with these, or the whole one.
        without_them: The same without them.
    """

    item: LabelledItem
    categories: frozenset[str]
    with_them: Policy
    without_them: Policy


def pairs(
    items: Sequence[LabelledItem], taxonomy: str, policy: Policy, *, others: int | None = None
) -> list[Pair]:
    """What `adherence` judges; those of the same categories one after the other, so that an engine computes them once.

    Args:
        items: As for `adherence`, like the others.
        taxonomy: Whose categories they are labelled with.
        policy: A policy that is itself a taxonomy.
        others: How many categories beside the item's own the policies have; None for all.

    Raises:
        PolicyError: The taxonomy or the policy is none of the table's.
        DataError: No item can be used.
    """
    known = {category.id for category in policy.categories}
    labelled: list[tuple[LabelledItem, frozenset[str]]] = []
    for item in items:
        ids = {one for name in item.categories for one in corresponding(name, taxonomy, policy.name)}
        mine = frozenset(ids & known)
        # A policy without categories can't be asked.
        if item.unsafe and mine and len(mine) < len(known):
            labelled.append((item, mine))
    if not labelled:
        raise DataError(
            f"None of the {len(items)} items is unsafe for a category of {taxonomy} that corresponds to one of "
            f"{policy.name}."
        )
    labelled.sort(key=lambda pair: sorted(pair[1]))
    policies: dict[frozenset[str], tuple[Policy, Policy]] = {}
    for own in dict.fromkeys(own for _, own in labelled):
        rest = _drawn(policy, own, others)
        policies[own] = policy if others is None else _only(policy, rest | own), _only(policy, rest)
    return [Pair(item, own, *policies[own]) for item, own in labelled]


def adherence(
    items: Sequence[LabelledItem],
    taxonomy: str,
    policy: Policy,
    guard_of: Callable[[Policy], Guard],
    store: Path | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    *,
    others: int | None = None,
) -> list[Adherence]:
    """Judges each unsafe item twice, under a policy with and under the same without its categories.

    What is safe is judged once, under the policies of the others in turn: a guard that calls all harm unsafe that its
    policy names, and much else, follows nothing.

    Args:
        items: Labelled items. Unsafe ones whose categories the policy doesn't have are left out.
        taxonomy: Whose categories they are labelled with, one of `taxonomy_names()`.
        policy: A policy that is itself a taxonomy of the table, such as `rsafe-18`.
        guard_of: The guard for a policy.
        store: A file for the verdicts, as `judge` takes it.
        on_progress: Called with the number of verdicts that are there.
        others: How many categories beside the item's own the policies have; None for all. Fewer are drawn anew for
            each set of own categories, always the same ones.

    Returns:
        For each category, in the policy's order, then for all items together.

    Raises:
        PolicyError: The taxonomy or the policy is none of the table's.
        DataError: No item can be used, or the store holds something else than verdicts.
    """
    asked = pairs(items, taxonomy, policy, others=others)
    with_it = judge_under([(pair.item, pair.with_them) for pair in asked], guard_of, store, on_progress)
    without_it = judge_under(
        [(pair.item, pair.without_them) for pair in asked],
        guard_of,
        store,
        lambda done: on_progress(len(asked) + done),
    )
    harmless = [item for item in items if not item.unsafe]
    under = list({pair.with_them.digest: pair.with_them for pair in asked}.values())
    passed = judge_under(
        [(item, under[number * len(under) // len(harmless)]) for number, item in enumerate(harmless)],
        guard_of,
        store,
        lambda done: on_progress(2 * len(asked) + done),
    )
    rows = [
        (pair.categories, first.label, second.label)
        for pair, first, second in zip(asked, with_it, without_it, strict=True)
    ]
    found = [
        _row(category.id, [row for row in rows if category.id in row[0]]) for category in policy.categories
    ]
    total = _row("", rows)
    labels = Counter(verdict.label for verdict in passed)
    total = replace(
        total,
        failures=total.failures + labels[None],
        harmless=len(harmless),
        false_positives=labels["unsafe"],
    )
    return [*(one for one in found if one.items), total]


def judge_under(
    asked: Sequence[tuple[LabelledItem, Policy]],
    guard_of: Callable[[Policy], Guard],
    store: Path | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Verdict]:
    """A verdict for each item under its policy, in order.

    Args:
        asked: Items, each with its policy.
        guard_of: The guard for a policy, asked for once each.
        store: A file for the verdicts, as `judge` takes it.
        on_progress: Called with the number of verdicts that are there.

    Raises:
        DataError: The store holds something else than verdicts.
    """
    guards = {digest: guard_of(policy) for digest, policy in {one.digest: one for _, one in asked}.items()}
    of_item = {id(item): guards[policy.digest] for item, policy in asked}
    return judge([item for item, _ in asked], lambda item: of_item[id(item)], store, on_progress=on_progress)


def _drawn(policy: Policy, own: frozenset[str], others: int | None) -> frozenset[str]:
    rest = [category.id for category in policy.categories if category.id not in own]
    if others is None or others >= len(rest):
        return frozenset(rest)
    return frozenset(random.Random(" ".join(sorted(own))).sample(rest, others))


def _only(policy: Policy, ids: frozenset[str]) -> Policy:
    categories = tuple(category for category in policy.categories if category.id in ids)
    return policy.model_copy(update={"categories": categories})


def _row(category: str, rows: Sequence[tuple[frozenset[str], str | None, str | None]]) -> Adherence:
    pairs = [(first, second) for _, first, second in rows]
    return Adherence(
        category=category,
        items=len(pairs),
        unsafe_with=sum(first == "unsafe" for first, _ in pairs),
        safe_without=sum(second == "safe" for _, second in pairs),
        flipped=sum(pair == ("unsafe", "safe") for pair in pairs),
        failures=sum(None in pair for pair in pairs),
    )
