"""Policies that fit a budget of tokens."""

from __future__ import annotations

from rsafe_plugins.policy.model import Policy

_CHARACTERS = 4  # of a token, on average in English


def condensed(policy: Policy, tokens: int) -> tuple[Policy, int]:
    """A policy without as many of its examples as it takes to fit a budget.

    The last example of the category that has most goes first, those of what is allowed after those of what isn't.
    Everything else stays whole: a rule that is cut says something else.

    Args:
        policy: The policy.
        tokens: What its text may take, about: a token is counted as four characters.

    Returns:
        The policy, and how many examples it lost. It may still be over the budget, for lack of examples.
    """
    excess = length(policy) - tokens * _CHARACTERS
    dropped = 0
    kept = {
        part: [list(getattr(category, part)) for category in policy.categories]
        for part in ("examples", "allowed_examples")
    }
    for lists in kept.values():
        while excess > 0 and (longest := max(lists, key=len)):
            excess -= len(longest.pop()) + 4
            dropped += 1
    if not dropped:
        return policy, 0
    categories = tuple(
        category.model_copy(update={part: tuple(lists[number]) for part, lists in kept.items()})
        for number, category in enumerate(policy.categories)
    )
    return policy.model_copy(update={"categories": categories}), dropped


def length(policy: Policy) -> int:
    """The characters of a policy's text, with what the prompt puts between them."""
    return sum(
        len(text) + 4
        for category in policy.categories
        for text in (
            category.id,
            category.name,
            category.description,
            *category.covers,
            *category.allows,
            *category.examples,
            *category.allowed_examples,
        )
    )
