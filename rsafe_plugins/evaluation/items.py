"""Labelled items, and our own files of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.files import rows
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

    @model_validator(mode="before")
    @classmethod
    def _of_a_table(cls, fields: Any) -> Any:
        """A table has cells without anything in them, numbers for ids, and no lists."""
        if not isinstance(fields, Mapping):
            return fields
        known = {name: value for name, value in fields.items() if value is not None}
        if isinstance(number := known.get("id"), int) and not isinstance(number, bool):
            known["id"] = str(number)
        if isinstance(listed := known.get("categories"), str):
            known["categories"] = tuple(filter(None, map(str.strip, listed.split(";"))))
        return known

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
    """All items of one file of ours, in order: JSON Lines, or any other form that `files.rows` reads.

    Raises:
        DataError: The file can't be read, holds no item, or a row is no item.
    """
    path = Path(path)
    items = [labelled(row, f"{path}, {place}") for place, row in rows(path)]
    if not items:
        raise DataError(f"{path} holds no items; expected one JSON object a line.")
    return items


def labelled(fields: Mapping[str, Any], where: str) -> LabelledItem:
    """An item from its fields.

    Args:
        fields: The fields of `LabelledItem`; others are left out.
        where: Where they come from, for messages.

    Raises:
        DataError: They are no item.
    """
    try:
        return LabelledItem.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the item"
        raise DataError(f"{where}: {field}: {first['msg']}.") from error
