"""What a training run reads: files with a share each, and a part held out to watch it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import PydanticSerializationError

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem, read_items
from rsafe_plugins.guard.content import Content


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """A file of labelled items and how many of them are taken; None for all."""

    path: Path
    take: int | None = None

    @classmethod
    def parse(cls, text: str) -> TrainingFile:
        """From `FILE` or `FILE@COUNT`.

        Raises:
            DataError: The count is no positive whole number.
        """
        path, mark, count = text.rpartition("@")
        if not mark or Path(text).exists():
            return cls(Path(text))
        if not count.isdecimal() or int(count) < 1:
            raise DataError(f"Expected FILE or FILE@COUNT with a count of items, not {text!r}.")
        return cls(Path(path), int(count))


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Items to train on, those of the same files that training leaves out, and what was held out."""

    items: list[LabelledItem]
    unused: list[LabelledItem]
    held_out: list[LabelledItem]


def read_training_data(files: Sequence[TrainingFile], held_out: int, seed: int) -> TrainingData:
    """Draws each file's share and the part held out of it.

    Args:
        files: What to read.
        held_out: Items a file that are never trained on, nor others with their text; at most a tenth of it. Of
            responses to one prompt a tenth of these at most are held out, and the others are left out altogether, so
            that what was learned of a prompt doesn't help to judge its responses.
        seed: The same seed draws the same items.

    Raises:
        DataError: A file can't be read, an id stands in the data twice, a text has both labels, or all items have one.
    """
    data = TrainingData([], [], [])
    for file in files:
        items = read_items(file.path)
        random.Random(seed).shuffle(items)
        kept, items = _hold_out(items, min(held_out, len(items) // 10))
        last = len(items) if file.take is None else file.take
        data.held_out.extend(kept)
        data.items.extend(items[:last])
        data.unused.extend(items[last:])
    everything = [*data.items, *data.unused, *data.held_out]
    texts = {item.content() for item in data.held_out}
    for part in (data.items, data.unused):
        part[:] = [item for item in part if item.content() not in texts]
    if len({item.id for item in everything}) < len(everything):
        raise DataError("Each item needs an id of its own; some ids stand in the data more than once.")
    _check_characters(everything)
    _check_labels_agree(everything)
    if not data.items:
        raise DataError("There is nothing to train on: all items have the texts of those that are held out.")
    labels = {item.label for item in data.items}
    if len(labels) < 2:
        raise DataError(f"Training needs safe and unsafe items; all {len(data.items)} are {labels.pop()}.")
    return data


def _hold_out(items: Sequence[LabelledItem], count: int) -> tuple[list[LabelledItem], list[LabelledItem]]:
    """So many of the items, and those of the others that may be trained on."""
    if not count:
        return [], list(items)
    together: dict[str, list[LabelledItem]] = {}
    for item in items:
        answered = item.task == "response" and item.prompt
        together.setdefault(f"prompt {answered}" if answered else f"id {item.id}", []).append(item)
    kept: list[LabelledItem] = []
    rest: list[LabelledItem] = []
    for group in together.values():
        if len(kept) == count:
            rest.extend(group)
        kept.extend(group[: min(max(1, count // 10), count - len(kept))])
    places = {item.id: place for place, item in enumerate(items)}
    return kept, sorted(rest, key=lambda item: places[item.id])


def _check_characters(items: Sequence[LabelledItem]) -> None:
    for item in items:
        try:
            item.model_dump_json()
        except PydanticSerializationError:
            raise DataError(
                f"The item {item.id} holds half of a surrogate pair, which no file can hold: mend its text."
            ) from None


def _check_labels_agree(items: Sequence[LabelledItem]) -> None:
    first: dict[Content, LabelledItem] = {}
    for item in items:
        same = first.setdefault(item.content(), item)
        if same.label != item.label:
            raise DataError(
                f"The items {same.id} and {item.id} are the same text, one labelled {same.label} and the other "
                f"{item.label}: remove one of them."
            )
