"""The warm start for the dialect `rsafe-by-category`: several questions about one content, a category each.

A content and its questions are one sequence with an ending for each question, so that the content is computed once,
as it is when the guard asks.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from transformers import PreTrainedTokenizerBase

from rsafe_plugins.alignment.categorize import Categorizer
from rsafe_plugins.alignment.examples import (
    PolicyVariant,
    category_ids,
    neighbours,
    packaged,
    wordings_of,
)
from rsafe_plugins.alignment.recipe import WarmStartSettings
from rsafe_plugins.alignment.warm_start import (
    BARE_PREFILL,
    BatchEncoder,
    Encoded,
    Encoder,
    common_prefix,
    label_weights,
)
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects.rsafe_by_category import RSafeByCategory
from rsafe_plugins.guard.prompt import GuardPrompt
from rsafe_plugins.guard.verdict import Label
from rsafe_plugins.policy import Category, Policy

_OTHERS = 5  # categories that an item is asked about beside its own
_MOST = 300  # items of one category in a pass, where what is taught is which category an item meets


@dataclass(frozen=True, slots=True)
class Question:
    """One category that a content is asked about.

    Attributes:
        category: What stands in the prompt.
        label: `unsafe` if the content meets it.
        weight: Of this question in the loss.
    """

    category: Category
    label: Label
    weight: float


@dataclass(frozen=True, slots=True)
class Questions:
    """A content and what is asked about it; one question or more."""

    content: Content
    questions: tuple[Question, ...]


class MixedEncoder(Encoder):
    """Encodes examples that share a policy, and contents with their questions too."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: GuardPrompt, settings: WarmStartSettings
    ) -> None:
        super().__init__(tokenizer, prompt, settings)
        self._by_category = CategoryEncoder(tokenizer, RSafeByCategory().prompt, settings)

    def encode(
        self, variant: PolicyVariant | None, examples: Sequence[Any]
    ) -> tuple[list[int], list[Encoded]]:
        """The ids that all begin with, then a sequence each; without a policy it is questions that are encoded."""
        if variant is None:
            return self._by_category.encode(variant, examples)
        return super().encode(variant, examples)


class CategoryEncoder(BatchEncoder):
    """Encodes contents and their questions, as the guard's engine is given them."""

    def encode(self, variant: Any, examples: Sequence[Questions]) -> tuple[list[int], list[Encoded]]:
        """The ids that all begin with, then a sequence a content whose endings are its questions."""
        asked = [
            [self._ids(self._text(question, example.content)) for question in example.questions]
            for example in examples
        ]
        shared = common_prefix([ids for prompts in asked for ids in prompts])
        sequences = []
        for prompts, example in zip(asked, examples, strict=True):
            end = common_prefix(prompts)
            endings = [
                self._ending(ids[end:], question)
                for ids, question in zip(prompts, example.questions, strict=True)
            ]
            labels = [question.label for question in example.questions]
            met = labels.index("unsafe") if "unsafe" in labels and len(labels) > 1 else None
            share = self._settings.distill.share(example.content.kind)
            sequences.append(Encoded(prompts[0][shared:end], endings, met, share))
        return asked[0][0][:shared], sequences

    def _text(self, question: Question, content: Content) -> str:
        return self._prompt.text(Policy(name="asked", categories=(question.category,)), content)

    def _ending(self, ids: list[int], question: Question) -> tuple[list[int], list[float]]:
        begun = ids + self._ids(BARE_PREFILL)
        verdict = self._ids(f"{question.label}}}")
        weights = [question.weight * weight for weight in label_weights(len(verdict))]
        return begun + verdict, [0.0] * len(begun) + weights


class Asker:
    """Decides what a content is asked about.

    A category that no item meets is never asked about: of such a one only "safe" could be learned, whatever it says.
    The others are asked about as often as they are met, so that a category's name alone tells nothing.

    Args:
        items: Labelled items of any task.
        categorizer: Names the category where the source doesn't.

    Raises:
        DataError: No unsafe prompt or response has a category, and not all items are documents.
    """

    def __init__(self, items: Sequence[LabelledItem], categorizer: Categorizer) -> None:
        self._categorizer = categorizer
        self._met = Counter(
            first for item in items if item.unsafe and (first := next(iter(self._own(item)), None))
        )
        if not self._met and any(item.task != "document" for item in items):
            raise DataError(
                f"One question for each category needs unsafe items that name theirs, and none of the {len(items)} "
                "items does: name their categories, or train without by_category."
            )

    def answerable(self, items: Sequence[LabelledItem]) -> list[LabelledItem]:
        """The items that can be asked about: all but unsafe ones whose category nobody knows."""
        return [item for item in items if not item.unsafe or item.task == "document" or self._own(item)]

    def of_known_category(self, items: Sequence[LabelledItem]) -> list[LabelledItem]:
        """The unsafe prompts and responses whose category is known; of one that many meet, only the first 300."""
        taken: Counter[str] = Counter()
        chosen = []
        for item in items:
            if item.unsafe and (own := self._own(item)) and taken[own[0]] < _MOST:
                taken[own[0]] += 1
                chosen.append(item)
        return chosen

    def questions(self, item: LabelledItem, chance: random.Random) -> Questions:
        """What is asked about an item that can be asked about.

        An unsafe item is asked about its own category and about five that it doesn't touch; a safe one about the
        one that comes nearest, and about five others. The first weighs as much as the five.
        """
        if item.task == "document":
            return _about_injection(item)
        own = self._own(item)
        others = self._others(own, chance)
        if item.unsafe:
            asked = _asked(others, "safe", 1.0, chance) + _asked(own[:1], "unsafe", 1.0, chance)
            return Questions(item.content(), tuple(asked))
        nearest = [one for one in own[:1] if one in self._met]
        others = others or self._others((), chance)
        asked = _asked(others, "safe", 0.5 if nearest else 1.0, chance) + _asked(nearest, "safe", 0.5, chance)
        return Questions(item.content(), tuple(asked))

    def _own(self, item: LabelledItem) -> tuple[str, ...]:
        """The category that it meets or, if it is safe, comes nearest to; then those that it could touch too."""
        if item.task == "document":
            return ()
        ids = category_ids(item)
        if not ids and (guess := self._categorizer.nearest(item)):
            ids = neighbours(guess)
        return ids

    def _others(self, own: Sequence[str], chance: random.Random) -> list[str]:
        """Some that it doesn't touch, each the likelier the more often it is met (Efraimidis and Spirakis, 2006)."""
        keys = {one: chance.random() ** (1 / met) for one, met in self._met.items() if one not in own}
        return sorted(keys, key=lambda one: -keys[one])[:_OTHERS]


def _about_injection(item: LabelledItem) -> Questions:
    first, *_ = packaged("prompt-injection").for_kind("document").categories
    return Questions(item.content(), (Question(first, item.label, 1.0),))


def _asked(ids: Sequence[str], label: Label, weight: float, chance: random.Random) -> list[Question]:
    """Questions with one answer, which share a weight."""
    return [Question(_put(one, chance), label, weight / len(ids)) for one in ids]


def _put(identifier: str, chance: random.Random) -> Category:
    """A category of `rsafe-18` in some words, at times without a description."""
    name, description = chance.choice(wordings_of(identifier))
    return Category(id=identifier, name=name, description="" if chance.random() < 0.15 else description)


def category_batches(
    items: Sequence[LabelledItem], size: int, seed: int, asker: Asker
) -> Iterator[tuple[None, list[Questions]]]:
    """Every item once, in batches of mixed tasks and lengths: what differs most in length is questions, not items.

    Args:
        items: Items that can be asked about.
        size: Contents a batch.
        seed: The same seed gives the same batches.
        asker: What decides what they are asked about.
    """
    chance = random.Random(seed)
    shuffled = list(items)
    chance.shuffle(shuffled)
    for start in range(0, len(shuffled), size):
        yield None, [asker.questions(item, chance) for item in shuffled[start : start + size]]


def category_passes(
    items: Sequence[LabelledItem], size: int, seed: int, asker: Asker
) -> Iterator[tuple[None, list[Questions]]]:
    """Pass after pass of `category_batches`, each in another order, with other words and other questions."""
    return chain.from_iterable(category_batches(items, size, one, asker) for one in count(seed))


def mixed(first: Iterator[Any], second: Iterator[Any], share: float, seed: int) -> Iterator[Any]:
    """Draws from two sources until one that is to be drawn from has nothing left.

    Args:
        first: Where one comes from otherwise.
        second: Where the next one comes from with the probability `share`.
        share: 0 to 1.
        seed: The same seed gives the same order.
    """
    chance = random.Random(seed)
    with suppress(StopIteration):
        while True:
            yield next(second if chance.random() < share else first)
