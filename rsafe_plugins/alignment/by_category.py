"""The warm start for the dialect `rsafe-by-category`: several questions about one content, a category each.

A content and its questions are one sequence with an ending for each question, so that the content is computed once,
as it is when the guard asks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rsafe_plugins.alignment.examples import by_length, category_ids, wordings_of
from rsafe_plugins.alignment.warm_start import (
    BARE_PREFILL,
    BatchEncoder,
    Encoded,
    common_prefix,
    label_weights,
)
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.verdict import Label
from rsafe_plugins.policy import Category, Policy

_ASKED = 4  # categories that an item doesn't meet
_OWN_WORDINGS = 2  # of the category that it meets


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
            sequences.append(Encoded(prompts[0][shared:end], endings))
        return asked[0][0][:shared], sequences

    def _text(self, question: Question, content: Content) -> str:
        return self._prompt.text(Policy(name="asked", categories=(question.category,)), content)

    def _ending(self, ids: list[int], question: Question) -> tuple[list[int], list[float]]:
        begun = ids + self._ids(BARE_PREFILL)
        verdict = self._ids(f"{question.label}}}")
        weights = [question.weight * weight for weight in label_weights(len(verdict))]
        return begun + verdict, [0.0] * len(begun) + weights


def questions(item: LabelledItem, chance: random.Random) -> Questions:
    """What is asked about an item that can be asked about.

    An unsafe item is asked about its own category twice, in different words, and about four that its source's
    category doesn't touch; a safe one about four. Both answers weigh the same.
    """
    if item.task == "document":
        return _about_injection(item)
    every = [category.id for category in Policy.load("rsafe-18").categories]
    own = category_ids(item)
    others = chance.sample([one for one in every if one not in own], _ASKED)
    asked = [Question(_put(one, chance), "safe", 1 / _ASKED) for one in others]
    if item.unsafe:
        asked += [Question(_put(own[0], chance), "unsafe", 1 / _OWN_WORDINGS) for _ in range(_OWN_WORDINGS)]
    return Questions(item.content(), tuple(asked))


def _about_injection(item: LabelledItem) -> Questions:
    first, *_ = Policy.load("prompt-injection").for_kind("document").categories
    return Questions(item.content(), (Question(first, item.label, 1.0),))


def _put(identifier: str, chance: random.Random) -> Category:
    """A category of `rsafe-18` in some words, at times without a description."""
    name, description = chance.choice(wordings_of(identifier))
    return Category(id=identifier, name=name, description="" if chance.random() < 0.15 else description)


def answerable(items: Sequence[LabelledItem]) -> list[LabelledItem]:
    """The items that can be asked about: all but unsafe ones whose category isn't known."""
    return [item for item in items if not item.unsafe or item.task == "document" or category_ids(item)]


def category_batches(
    items: Sequence[LabelledItem], size: int, seed: int
) -> Iterator[tuple[None, list[Questions]]]:
    """Every item once, in batches of about one length.

    Args:
        items: Items that can be asked about.
        size: Contents a batch.
        seed: The same seed gives the same batches.
    """
    chance = random.Random(seed)
    ordered = by_length(items, size, chance)
    for start in range(0, len(ordered), size):
        yield None, [questions(item, chance) for item in ordered[start : start + size]]
