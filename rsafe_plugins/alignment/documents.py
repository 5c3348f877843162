"""More documents, made of what the data has: harmless prompts, alone or with an instruction hidden among them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rsafe_plugins.evaluation.items import LabelledItem

_SHORT = 40  # words of a prompt that may stand for a document
_INSTRUCTION = 80  # words of a document that may be hidden in another one
_PASSAGES = 4  # at most, around what is hidden
_TIMES = 3  # that an instruction is hidden at most


def as_documents(items: Sequence[LabelledItem], most: int, chance: random.Random) -> list[LabelledItem]:
    """Harmless short prompts as documents: harmless ones are many, and few sets have enough of them.

    Long prompts are left out, since they often tell the assistant whom to play, which in a document is an injection.

    Args:
        items: Labelled items of any task.
        most: So many at most are drawn.
        chance: Source of randomness.
    """
    short = _short(items)
    return [
        _document(f"{item.id}/document", item.prompt, "safe")
        for item in chance.sample(short, min(most, len(short)))
    ]


def injected(items: Sequence[LabelledItem], most: int, chance: random.Random) -> list[LabelledItem]:
    """Documents in pairs that differ in one passage: in one it is an injected instruction, in the other harmless.

    So what tells them apart is the instruction, and not what else the document says.

    Args:
        items: Labelled items of any task. Unsafe documents of at most 80 words are taken for instructions, harmless
            prompts of at most 40 words for the other passages.
        most: So many at most are made, and six at most of each instruction; none where the items have no instructions,
            or hardly any harmless prompts.
        chance: Source of randomness.
    """
    passages = [item.prompt for item in _short(items)]
    instructions = [
        item
        for item in items
        if item.task == "document" and item.unsafe and len(item.document.split()) <= _INSTRUCTION
    ]
    if not instructions or len(passages) <= _PASSAGES:
        return []
    made: list[LabelledItem] = []
    chance.shuffle(instructions)
    for number, hidden in enumerate((instructions * _TIMES)[: most // 2]):
        harmless, *around = chance.sample(passages, chance.randint(2, 1 + _PASSAGES))
        place, separator = chance.randint(0, len(around)), chance.choice((" ", "\n", "\n\n"))
        for name, text, label in (("hidden", hidden.document, "unsafe"), ("harmless", harmless, "safe")):
            document = separator.join([*around[:place], text, *around[place:]])
            made.append(_document(f"{hidden.id}/{name}-{number}", document, label))
    return made


def _short(items: Sequence[LabelledItem]) -> list[LabelledItem]:
    """Harmless short prompts, but for those that are an injection in a document."""
    injections = {item.document for item in items if item.task == "document" and item.unsafe}
    return [
        item
        for item in items
        if item.task == "prompt"
        and not item.unsafe
        and len(item.prompt.split()) <= _SHORT
        and item.prompt not in injections
    ]


def _document(identifier: str, document: str, label: str) -> LabelledItem:
    return LabelledItem.model_validate(
        {"id": identifier, "task": "document", "document": document, "label": label}
    )
