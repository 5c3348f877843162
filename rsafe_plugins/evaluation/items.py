"""Labelled items, read from JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rsafe_plugins.errors import DataError
from rsafe_plugins.guard.content import Content


class LabelledItem(BaseModel):
    """One labelled prompt, response or document.

    Attributes:
        id: Unique within its file.
        task: What is judged: `prompt`, `response` (to `prompt`) or `document`.
        prompt: The prompt; for a response the prompt it answers.
        response: The response.
        document: The document.
        label: What it is under the policy that its source was labelled with.
        categories: What the source names, in the source's own words; empty where it names none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    task: Literal["prompt", "response", "document"]
    prompt: str = ""
    response: str = ""
    document: str = ""
    label: Literal["safe", "unsafe"]
    categories: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_what_is_judged(self) -> LabelledItem:
        if not getattr(self, self.task):
            raise ValueError(f"the task is {self.task!r}, so the field {self.task!r} must hold text")
        return self

    @property
    def unsafe(self) -> bool:
        """Whether the label is `unsafe`."""
        return self.label == "unsafe"

    def content(self) -> Content:
        """The content that a guard is given."""
        if self.task == "prompt":
            return Content.prompt(self.prompt)
        if self.task == "response":
            return Content.response(self.response, self.prompt)
        return Content.document(self.document)


def read_items(path: str | Path) -> list[LabelledItem]:
    """All items of one JSON Lines file, in order.

    Raises:
        DataError: The file can't be read, holds no item, or a line is no item.
    """
    items = list(_items(Path(path)))
    if not items:
        raise DataError(f"{path} holds no items; expected one JSON object a line.")
    return items


def _items(path: Path) -> Iterator[LabelledItem]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _item(line, path, number)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).") from error


def _item(line: str, path: Path, number: int) -> LabelledItem:
    try:
        return LabelledItem.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: expected a JSON object ({error.msg}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the item"
        raise DataError(f"{path}, line {number}: {where}: {first['msg']}.") from error
