"""Policies: the categories of content that a guard must find unsafe."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files

ContentKind = Literal["prompt", "response", "document", "tool_call", "tool_result"]
CONTENT_KINDS: tuple[ContentKind, ...] = get_args(ContentKind)

MAX_CATEGORIES = 200
MAX_ID_LENGTH = 64
MAX_NAME_LENGTH = 200

# Fields that a digest is made of even when they are empty.
_ALWAYS = ("id", "name", "description", "covers", "allows", "applies_to")
_BUILTIN = Path(__file__).parent / "builtin"


def _invalid(sentence: str, at: files.Location | None = None) -> PydanticCustomError:
    # Passing the sentence as context keeps braces in a user's text from being read as placeholders.
    context: dict[str, Any] = {"sentence": sentence}
    if at is not None:
        context["at"] = at
    return PydanticCustomError("policy", "{sentence}", context)


def _line(text: str) -> str:
    """The text on one line: a policy's text must not be able to change the lines of a prompt."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n":
            raise _invalid(f"the character U+{ord(character):04X} can't stand in a policy; remove it")
    return " ".join(unicodedata.normalize("NFC", text).split())


def _filled_line(text: str) -> str:
    line = _line(text)
    if not line:
        raise _invalid("expected text, but this is empty; write some")
    return line


def _name(text: str) -> str:
    line = _filled_line(text)
    if len(line) > MAX_NAME_LENGTH:
        raise _invalid(
            f"a name has at most {MAX_NAME_LENGTH} characters, this has {len(line)}; "
            f"put the rest in the description"
        )
    return line


def _id(text: str) -> str:
    line = _filled_line(text)
    if len(line) > MAX_ID_LENGTH:
        raise _invalid(f"an id has at most {MAX_ID_LENGTH} characters, this has {len(line)}; shorten it")
    # Verdicts list ids separated by commas.
    if not line.isprintable() or any(character in " ,;<>{}[]\\|\u00a6" for character in line):
        raise _invalid(
            f"an id is one word without commas or brackets, such as U1, but this is {files.shown(line)}; shorten it"
        )
    return line


def _key(text: str) -> str:
    """What the loose spellings of an id or a name have in common."""
    folded = unicodedata.normalize("NFKC", text).casefold().replace("&", " and ")
    words = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in folded).split()
    return " ".join(words)


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed, validated (pydantic's own is not, and keeps stale digests)."""
        # Not `dict(self)`, which has the cached properties too.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate(fields | dict(update or {}))


class Category(_Value):
    """One kind of content that a policy forbids.

    Text is kept on one line each: white space, line breaks included, becomes single spaces.

    Attributes:
        id: A short word that verdicts name the category by, such as `U1`; 1 to 64 characters, no white space,
            commas, semicolons, brackets, bars or backslashes.
        name: What people call it; 1 to 200 characters.
        description: What is meant, in a sentence; may be empty.
        covers: What else falls under the category.
        allows: What doesn't, though it may look like it.
        examples: Texts that fall under the category.
        allowed_examples: Texts that don't, though they may look like it.
        applies_to: The kinds of content that are judged by it; all, unless given.

    Raises:
        pydantic.ValidationError: A field is missing, unknown or can't be used.
    """

    id: Annotated[str, AfterValidator(_id)]
    name: Annotated[str, AfterValidator(_name)]
    description: Annotated[str, AfterValidator(_line)] = ""
    covers: tuple[Annotated[str, AfterValidator(_filled_line)], ...] = ()
    allows: tuple[Annotated[str, AfterValidator(_filled_line)], ...] = ()
    examples: tuple[Annotated[str, AfterValidator(_filled_line)], ...] = ()
    allowed_examples: tuple[Annotated[str, AfterValidator(_filled_line)], ...] = ()
    applies_to: tuple[ContentKind, ...] = CONTENT_KINDS

    @field_validator("applies_to")
    @classmethod
    def _in_order(cls, kinds: tuple[ContentKind, ...]) -> tuple[ContentKind, ...]:
        if not kinds:
            raise _invalid(
                "expected at least one kind of content, but the list is empty; remove it to mean all"
            )
        return tuple(kind for kind in CONTENT_KINDS if kind in kinds)


class Policy(_Value):
    """What a guard judges content against: a list of categories, most often read from a file.

    Attributes:
        name: What people call the policy; stands in each verdict. 1 to 200 characters.
        description: What it is for; may be empty. The guard model doesn't see it.
        categories: 1 to 200 categories. No two share an id or a name, whatever the case.

    Raises:
        pydantic.ValidationError: A field is missing, unknown or can't be used. Reading a policy from a file
            or from text raises `PolicyError` instead.

    Example:
        >>> Policy.load("rsafe-18").category("U9").name
        'Self-Harm & Suicide'
    """

    name: Annotated[str, AfterValidator(_name)]
    description: Annotated[str, AfterValidator(_line)] = ""
    categories: tuple[Category, ...]

    @field_validator("categories")
    @classmethod
    def _distinct(cls, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        if not categories:
            raise _invalid("expected at least one category, but the list is empty; add one")
        if len(categories) > MAX_CATEGORIES:
            raise _invalid(
                f"a policy has at most {MAX_CATEGORIES} categories, this has {len(categories)}; split it"
            )
        for field in ("id", "name"):
            first: dict[str, int] = {}
            for index, category in enumerate(categories):
                text = getattr(category, field)
                key = text.casefold()
                if first.setdefault(key, index) != index:
                    raise _invalid(
                        f"{files.shown(text)} is the {field} of categories[{first[key]}] too; "
                        f"give each category its own",
                        at=("categories", index, field),
                    )
        return categories

    @classmethod
    def builtin_names(cls) -> tuple[str, ...]:
        """The names of the policies that come with the package, in alphabetical order."""
        return tuple(sorted(path.stem for path in _BUILTIN.glob("*.yaml")))

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Self:
        """Reads a built-in policy or a policy file.

        Args:
            name_or_path: A built-in policy's name, such as `rsafe-18`, or the path of a `.yaml`, `.yml` or
                `.json` file of at most 1 MiB. A string with neither a suffix nor a path separator is a name.

        Raises:
            PolicyError: There is no such policy, or its file can't be used; the message names file, line and
                field.
        """
        if isinstance(name_or_path, str):
            if name_or_path in cls.builtin_names():
                return cls._read(_BUILTIN / f"{name_or_path}.yaml")
            if not _is_path(name_or_path):
                raise PolicyError(
                    f"There is no built-in policy {files.choices(name_or_path, cls.builtin_names())}, "
                    f"or the path of a .yaml, .yml or .json file."
                )
        return cls._read(Path(name_or_path))

    @classmethod
    def from_yaml(cls, text: str, source: str = "YAML policy") -> Self:
        """Reads a policy from YAML text.

        Args:
            text: The YAML, at most 1 MiB.
            source: What error messages call it.

        Raises:
            PolicyError: The text isn't a policy; the message names source, line and field.
        """
        return cls._validated(files.parse(text, "yaml", source))

    @classmethod
    def from_json(cls, text: str, source: str = "JSON policy") -> Self:
        """Reads a policy from JSON text.

        Args:
            text: The JSON, at most 1 MiB.
            source: What error messages call it.

        Raises:
            PolicyError: The text isn't a policy; the message names source, line and field.
        """
        return cls._validated(files.parse(text, "json", source))

    def to_yaml(self) -> str:
        """The policy as YAML that `from_yaml` reads back; what has its default value is left out."""
        return files.to_yaml(self.model_dump(mode="json", exclude_defaults=True))

    def to_json(self) -> str:
        """The policy as JSON that `from_json` reads back; what has its default value is left out."""
        return files.to_json(self.model_dump(mode="json", exclude_defaults=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to a file, over what may be there.

        Args:
            path: A path that ends in `.yaml`, `.yml` or `.json`, which decides the format.

        Raises:
            PolicyError: The suffix is another one, the file would be larger than one may be, or it can't be written.
        """
        target = Path(path)
        text = self.to_yaml() if files.file_format(target) == "yaml" else self.to_json()
        files.check_size(len(text.encode()), files.source_name(target))
        files.write_text(target, text)

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits (SHA-256) that change whenever a verdict could.

        They depend on the categories, their order and everything in them, and not on the policy's own name
        and description, the file's format or the process.
        """
        # What a category doesn't have leaves no trace, so that digests outlive new fields.
        categories = [
            {key: value for key, value in category.model_dump(mode="json").items() if value or key in _ALWAYS}
            for category in self.categories
        ]
        canonical = json.dumps(categories, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def for_kind(self, kind: ContentKind) -> Self:
        """The policy with only those categories that apply to a kind of content.

        Raises:
            PolicyError: None does, so content of that kind can't be judged by this policy.
        """
        categories = tuple(category for category in self.categories if kind in category.applies_to)
        if not categories:
            raise PolicyError(
                f"No category of the policy {files.shown(self.name)} applies to the kind of content "
                f"{files.shown(kind)}; use another policy, or add that kind to a category's applies_to."
            )
        if len(categories) == len(self.categories):
            return self
        return self.model_copy(update={"categories": categories})

    def category(self, id: str) -> Category:
        """The category with an id, whatever its case.

        Raises:
            PolicyError: The policy has no such category.
        """
        for category in self.categories:
            if category.id.casefold() == id.casefold():
                return category
        raise PolicyError(
            f"The policy {files.shown(self.name)} has no category "
            f"{files.choices(id, [category.id for category in self.categories])}."
        )

    def find(self, text: str) -> Category | None:
        """The category that `text` names by its id, its name or both, or None.

        Case, white space and punctuation don't matter, and `&` is the same as `and`. Where that leaves
        several categories, the exact spelling goes before others, and an id before a name.
        """
        return self._spellings.get(text.strip().casefold()) or self._spellings.get(_key(text))

    @cached_property
    def _spellings(self) -> Mapping[str, Category]:
        spellings: dict[str, Category] = {}
        for spelling in (str.casefold, _key):
            for form in ("{0.id}", "{0.name}", "{0.id} {0.name}"):
                for category in self.categories:
                    spellings.setdefault(spelling(form.format(category)), category)
        spellings.pop("", None)  # what a name of only punctuation leaves
        return spellings

    @classmethod
    def _read(cls, path: Path) -> Self:
        source = files.source_name(path)
        try:
            text = files.read_text(path)
        except FileNotFoundError:
            raise PolicyError(
                f"{source}: there is no such file; check the path, or use a built-in policy "
                f"({', '.join(cls.builtin_names())})."
            ) from None
        return cls._validated(files.parse(text, files.file_format(path), source))

    @classmethod
    def _validated(cls, document: files.Document) -> Self:
        try:
            return cls.model_validate(document.data)
        except ValidationError as error:
            keys = {0: list(cls.model_fields), 2: list(Category.model_fields)}
            raise files.describe(error, document, keys) from None


def _is_path(text: str) -> bool:
    return bool(Path(text).suffix) or any(separator in text for separator in "/\\")
