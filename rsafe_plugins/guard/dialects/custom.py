"""A dialect that a user declares in a file: a prompt template, and what the answer looks like."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsafe_plugins.backends.base import Message
from rsafe_plugins.errors import SettingsError
from rsafe_plugins.guard.content import Content
from rsafe_plugins.guard.dialects.base import Dialect, Thought
from rsafe_plugins.guard.prompt import GuardPrompt, Thinking
from rsafe_plugins.guard.verdict import Label
from rsafe_plugins.policy import Policy


class _Thought(BaseModel):
    model_config = ConfigDict(extra="forbid")

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    template: Path
    begin: str = ""
    labels: dict[str, Label]
    thought: _Thought | None = None
    categories: str | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _are_text(cls, labels: object) -> object:
        if isinstance(labels, dict) and not all(isinstance(word, str) for word in labels):
            raise ValueError("each label must be text: put words such as yes and no into quotes")
        return labels

    @model_validator(mode="after")
    def _tell_labels_apart(self) -> _Declared:
        if set(self.labels.values()) != {"safe", "unsafe"}:
            raise ValueError("labels must name at least one that is safe and one that is unsafe")
        words = [word.strip().casefold() for word in self.labels]
        if not all(words) or any(
            second.startswith(first)
            for place, first in enumerate(words)
            for second in words[:place] + words[place + 1 :]
        ):
            raise ValueError("no label may be empty or the beginning of another")
        return self


class CustomDialect(Dialect):
    """The dialect of a file.

    Args:
        path: A YAML file with `name`; `template`, a prompt template beside the file; `labels`, which says what each
            of the model's words means (`safe` or `unsafe`); and where they are wanted `begin`, what the answer
            begins with before the label; `thought` with `open` and `close`; `categories`, what the line with the
            categories begins with.
        template: A prompt template in the place of the file's own.

    Raises:
        SettingsError: The file can't be read or used; the message names the field.
        TemplateError: The template can't be read or used.
    """

    def __init__(self, path: Path, template: str | Path | None = None) -> None:
        try:
            declared = _Declared.model_validate(yaml.safe_load(path.read_text("utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "it"
            raise SettingsError(
                f"The dialect file {path}: {where} can't be used: {first['msg'].removeprefix('Value error, ')}."
            ) from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(
                f"The dialect file {path} can't be read as YAML ({type(error).__name__})."
            ) from error
        self.name = declared.name
        self.labels = declared.labels
        self.begin = declared.begin
        if declared.thought is not None:
            self.thought = Thought(declared.thought.open, declared.thought.close, f"\n{declared.begin}")
        if declared.categories is not None:
            unsafe = next(word for word, label in declared.labels.items() if label == "unsafe")
            self.naming = f"{declared.begin}{unsafe}\n{declared.categories}"
        self.form = _form(declared)
        words = " or ".join(word.strip() for word in declared.labels)
        self.expects = f"{words}{f' after {declared.begin.strip()!r}' if declared.begin.strip() else ''}"
        thinking = declared.thought
        marks = (declared.begin, declared.categories, *((thinking.open, thinking.close) if thinking else ()))
        self.delimiters = tuple(filter(None, ((mark or "").strip() for mark in marks)))
        self.prompt = GuardPrompt(template or path.parent / declared.template, self.delimiters)
        # Of what the file declares; the template shows in the messages.
        self.digest = hashlib.sha256(declared.model_dump_json().encode()).hexdigest()

    def messages(self, policy: Policy, content: Content, thinking: Thinking = "open") -> tuple[Message, ...]:
        """One user message, from the template."""
        return self.prompt.messages(policy, content, thinking)


def _form(declared: _Declared) -> re.Pattern[str]:
    thought = ""
    if declared.thought is not None:
        opening, closing = (
            re.escape(text.strip()) for text in (declared.thought.open, declared.thought.close)
        )
        thought = rf"(?:{opening}(?P<thought>(?:(?!{opening}|{closing}).)*){closing}\s*)?"
    labels = "|".join(re.escape(word.strip()) for word in declared.labels)
    named = ""
    if declared.categories is not None:
        named = rf"(?:\s*\n{re.escape(declared.categories.strip())}(?P<categories>[^\n]*))?"
    return re.compile(
        rf"{thought}{re.escape(declared.begin.strip())}\s*(?P<label>{labels})\W*{named}",
        re.DOTALL | re.IGNORECASE,
    )
