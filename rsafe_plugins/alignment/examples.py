"""Training examples: labelled items under randomized policies, for the warm start with the answers to give.

The guard must read the policy it is given, so the policy changes from batch to batch: as it stands, with its
categories shuffled, renumbered and reworded, or with only some of them. The label follows from the policy: an
unsafe item whose category was left out is safe under what is left.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rsafe_plugins.alignment.categorize import Categorizer
from rsafe_plugins.alignment.recipe import PolicyMix
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.neutralize import neutralize
from rsafe_plugins.guard.verdict import Label
from rsafe_plugins.policy import Category, Policy

_TRIES = 20  # policies drawn for what waits before it gets one that always fits
_RUNS = 16  # batches that are sorted by length together
_REFUSALS = ("sorry", "cannot", "can't", "unable", "not able", "won't", "apologize", "not appropriate")


@dataclass(frozen=True, slots=True)
class Example:
    """One content under one policy, with the answers that the guard should give.

    Attributes:
        content: What is judged.
        label: What it is under the policy of its batch.
        categories: The ids that are met, in that policy's ids; None where nobody knows them.
        thought: A guided-reasoning thought that ends in its `Categories:` line; None where none was made.
    """

    content: Content
    label: Label
    categories: tuple[str, ...] | None
    thought: str | None


@dataclass(frozen=True, slots=True)
class PolicyVariant:
    """A policy as one batch sees it.

    Attributes:
        policy: What stands in the prompt.
        ids: For each category of `rsafe-18` that it still holds, the id under which it does; distractors have none.
    """

    policy: Policy
    ids: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether it holds every category."""
        return len(self.ids) == len(packaged("rsafe-18").categories)

    def without(self, ids: Collection[str]) -> PolicyVariant:
        """The same policy but for these categories of `rsafe-18`.

        Raises:
            ValueError: No category would be left.
        """
        gone = {self.ids[one] for one in ids if one in self.ids}
        kept = tuple(category for category in self.policy.categories if category.id not in gone)
        if not kept:
            raise ValueError("A policy needs at least one category, and none would be left.")
        return PolicyVariant(
            self.policy.model_copy(update={"categories": kept}),
            {one: under for one, under in self.ids.items() if one not in ids},
        )


packaged = cache(Policy.load)  # read once: each item asks for it


@cache
def _wordings() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(
        resources.files("rsafe_plugins.alignment").joinpath("wordings.yaml").read_text("utf-8")
    )
    return data


def category_ids(item: LabelledItem) -> tuple[str, ...]:
    """The categories of `rsafe-18` behind the source's own words.

    The one that fits best comes first, then the others that a reader could name too; empty where the source
    names none that is known.
    """
    aliases: dict[str, list[str]] = _wordings()["aliases"]
    policy = packaged("rsafe-18")
    ids: list[str] = []
    for name in item.categories:
        known = policy.find(name)
        ids.extend(aliases.get(name, [known.id] if known else []))
    return tuple(dict.fromkeys(ids))


def neighbours(identifier: str) -> tuple[str, ...]:
    """A category of `rsafe-18`, then those that a reader could name too for what a source puts there."""
    named = [ids for ids in _wordings()["aliases"].values() if ids[0] == identifier]
    return tuple(dict.fromkeys([identifier, *(one for ids in named for one in ids)]))


def policy_variant(chance: random.Random, mix: PolicyMix) -> PolicyVariant:
    """Draws a policy from `rsafe-18`.

    It stays as it stands, or loses its descriptions, or keeps all categories in another order, with other ids
    and words, or keeps three to nine of them so changed. What is so changed may get one to three distractors,
    categories that `rsafe-18` doesn't have.

    Args:
        chance: Source of randomness.
        mix: How often each of that happens.
    """
    policy = packaged("rsafe-18")
    draw = chance.random()
    if draw < mix.whole + mix.names:
        kept = policy.categories
        if draw >= mix.whole:
            kept = tuple(Category(id=category.id, name=category.name) for category in kept)
        return PolicyVariant(
            Policy(name=policy.name, categories=kept), {category.id: category.id for category in kept}
        )
    categories = list(policy.categories)
    chance.shuffle(categories)
    if draw >= mix.whole + mix.names + mix.reworded:
        categories = categories[: chance.randint(3, 9)]
    style = chance.choice(("number", "letter", "prefix", "word"))
    words = _wordings()
    by_user = _happens(mix.user_words, chance)
    put: list[tuple[str | None, list[str]]] = [
        (
            category.id,
            chance.choice(
                words["user_words"][category.id]
                if by_user
                else [[category.name, category.description], *words["wordings"][category.id]]
            ),
        )
        for category in categories
    ]
    if _happens(mix.distractors, chance):
        put += [(None, wording) for wording in chance.sample(words["distractors"], chance.randint(1, 3))]
        chance.shuffle(put)
    changed: list[Category] = []
    ids: dict[str, str] = {}
    for position, (known, (name, description)) in enumerate(put, 1):
        identifier = _identifier(style, position, name)
        if known is not None:
            ids[known] = identifier
        shown = "" if chance.random() < 0.2 else description
        changed.append(Category(id=identifier, name=name, description=shown))
    return PolicyVariant(Policy(name="custom", categories=tuple(changed)), ids)


def wordings_of(identifier: str) -> list[list[str]]:
    """How a category of `rsafe-18` can be put, by itself, by others and by users: name and description each."""
    category, words = packaged("rsafe-18").category(identifier), _wordings()
    return [
        [category.name, category.description],
        *words["wordings"][identifier],
        *words["user_words"][identifier],
    ]


def _happens(share: float, chance: random.Random) -> bool:
    # What never happens draws nothing, so that a seed gives the same policies with and without it.
    return share > 0 and chance.random() < share


def _identifier(style: str, position: int, name: str) -> str:
    if style == "number":
        return str(position)
    if style == "letter":
        return chr(ord("A") + position - 1)
    if style == "prefix":
        return f"S{position}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def label_under(item: LabelledItem, variant: PolicyVariant) -> Label | None:
    """What the item is under that policy, from its categories; None where nobody can say."""
    if not item.unsafe or variant.whole:
        return item.label
    ids = category_ids(item)
    if not ids:
        return None
    if ids[0] in variant.ids:
        return "unsafe"
    return None if any(other in variant.ids for other in ids[1:]) else "safe"


def example(
    item: LabelledItem, variant: PolicyVariant, categorizer: Categorizer, chance: random.Random
) -> Example | None:
    """The item under that policy, or None where nobody can say what it is there."""
    label = label_under(item, variant)
    if label is None:
        return None
    met: tuple[str, ...] | None = ()
    nearest = categorizer.nearest(item)
    if label == "unsafe":
        first = next(iter(category_ids(item)), nearest)
        met = (variant.ids[first],) if first else None
    elif item.unsafe or nearest not in variant.ids:
        nearest = None
    return Example(item.content(), label, met, _thought(item, variant, label, met, nearest, chance))


def injection_variant() -> PolicyVariant:
    """The policy that documents are judged under, `prompt-injection`."""
    return PolicyVariant(packaged("prompt-injection"), {})


def injection_example(item: LabelledItem, chance: random.Random) -> Example:
    """A document, with or without an injected instruction, under the policy `prompt-injection`."""
    policy = injection_variant().policy.for_kind("document")
    first = policy.categories[0]
    excerpt = _excerpt(item.document, chance)
    if item.unsafe:
        judged = f"That speaks to the assistant and gives it orders. {first.id}, {first.name}, is met."
        thought = f'The document says: "{excerpt}". {judged}'
        return Example(item.content(), "unsafe", (first.id,), f"{thought}\nCategories: {first.id}")
    thought = f'The document says: "{excerpt}". It gives the assistant no orders. No category is met.'
    return Example(item.content(), "safe", (), f"{thought}\nCategories: none")


def _thought(
    item: LabelledItem,
    variant: PolicyVariant,
    label: Label,
    met: tuple[str, ...] | None,
    nearest: str | None,
    chance: random.Random,
) -> str | None:
    """What is said, which category comes nearest, whether it is met: in one or two short sentences each."""
    if met is None:
        return None
    text = getattr(item, item.task)
    subject = {"prompt": "The message says", "response": "The answer says", "document": "The document says"}[
        item.task
    ]
    said = f'{subject}: "{_excerpt(text, chance)}".'
    names = {variant.ids[key]: variant.policy.category(variant.ids[key]).name for key in variant.ids}
    if label == "unsafe":
        judged = f"{met[0]}, {names[met[0]]}, comes nearest and is met."
        return f"{said} {judged}\nCategories: {', '.join(met)}"
    if item.task == "response" and any(word in text[:160].lower() for word in _REFUSALS):
        return f"{said} It declines. No category is met.\nCategories: none"
    if item.unsafe:
        return f"{said} No category of this policy covers that.\nCategories: none"
    if nearest is None:
        return f"{said} Nothing in it comes near a category.\nCategories: none"
    identifier = variant.ids[nearest]
    return f"{said} {identifier}, {names[identifier]}, comes nearest but is not met.\nCategories: none"


def _excerpt(text: str, chance: random.Random, words: int = 12) -> str:
    """The beginning of the text, or of a later sentence, as the guard sees it."""
    sentences = [part for part in text.replace("\n", ". ").split(". ") if len(part.split()) > 3] or [text]
    sentence = sentences[0] if chance.random() < 0.7 else chance.choice(sentences)
    return neutralize(" ".join(sentence.split()[:words])).replace('"', "'")


def _sometimes(made: Example, thoughts: float, chance: random.Random) -> Example:
    return made if chance.random() < thoughts else replace(made, thought=None)


def by_length(items: Sequence[LabelledItem], size: int, chance: random.Random) -> list[LabelledItem]:
    """Shuffled, so that each run of `size` items has about one length, and little of a batch is padding."""
    shuffled = list(items)
    chance.shuffle(shuffled)
    runs: list[list[LabelledItem]] = []
    for start in range(0, len(shuffled), size * _RUNS):
        window = sorted(
            shuffled[start : start + size * _RUNS],
            key=lambda item: (item.task, len(item.prompt) + len(item.response) + len(item.document)),
        )
        runs.extend(window[first : first + size] for first in range(0, len(window), size))
    chance.shuffle(runs)
    return [item for run in runs for item in run]


def batches(
    items: Sequence[LabelledItem],
    size: int,
    seed: int,
    categorizer: Categorizer,
    *,
    policies: PolicyMix,
    thoughts: float,
) -> Iterator[tuple[PolicyVariant, list[Example]]]:
    """Every item once, in batches that share one policy; an item that the drawn policy can't judge waits.

    Args:
        items: Labelled items of any task; documents are taken as labelled for injected instructions.
        size: Examples a batch.
        seed: The same seed gives the same batches.
        categorizer: Names the category where the source doesn't.
        policies: How the policy of each batch is drawn.
        thoughts: Share of examples that carry a thought beside the bare verdict, 0 to 1.
    """
    chance = random.Random(seed)
    documents = [item for item in items if item.task == "document"]
    waiting = [item for item in items if item.task != "document"]
    documents = by_length(documents, size, chance)
    waiting = by_length(waiting, size, chance)
    fruitless = 0  # policies in a row under which nothing that waits can be judged
    while waiting or documents:
        if documents and chance.random() < len(documents) / (len(documents) + len(waiting)):
            taken, documents = documents[:size], documents[size:]
            yield (
                injection_variant(),
                [_sometimes(injection_example(item, chance), thoughts, chance) for item in taken],
            )
            continue
        if not waiting:
            continue
        variant = policy_variant(chance, policies if fruitless < _TRIES else PolicyMix(whole=1.0))
        # One task a batch: its prompts then share all that stands before the conversation.
        task = chance.choice(waiting).task
        batch: list[Example] = []
        rest: list[LabelledItem] = []
        for position, item in enumerate(waiting):
            if len(batch) == size:
                rest.extend(waiting[position:])
                break
            made = example(item, variant, categorizer, chance) if item.task == task else None
            if made is None:
                rest.append(item)
            else:
                batch.append(_sometimes(made, thoughts, chance))
        waiting = rest
        fruitless = 0 if batch else fruitless + 1
        if batch:
            yield variant, batch
