"""What translators make: pieces of policy text with their place, rules drafted from them, and the report on both."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy.model import (
    CONTENT_KINDS,
    MAX_CATEGORIES,
    MAX_ID_LENGTH,
    MAX_NAME_LENGTH,
    Category,
    ContentKind,
    Policy,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text in a source.

    Attributes:
        text: The text.
        file: The file it stands in, as the source names it.
        line: The line there, from 1; 0 where the format has no lines.
        key: Where in the file's data, such as `prompts[0].content`; empty where the file is text.
        indent: How far it is indented.
    """

    text: str
    file: str
    line: int = 0
    key: str = ""
    indent: int = field(default=0, compare=False)

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        at = f"{self.file}:{self.line}" if self.line else self.file
        return f"{at} ({self.key})" if self.key else at


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a report.

    Attributes:
        piece: What was found.
        went: Where it went, such as `input C1 description`; empty where it is no policy.
        reason: Why it is no policy; empty where it went somewhere, or where nobody knows what it is.
    """

    piece: Piece
    went: str = ""
    reason: str = ""

    @property
    def is_placed(self) -> bool:
        """Whether it is known what became of it."""
        return bool(self.went or self.reason)


@dataclass(slots=True)
class Rule:
    """A category in the making.

    Attributes:
        name: What people call it; its first piece is where it stands.
        piece: The piece it was made from.
        id: The source's own id; empty where it has none.
        description: What is meant.
        covers: What else falls under it, with the pieces they stand in.
        allows: What doesn't.
        examples: Texts that fall under it.
        allowed_examples: Texts that don't.
        more: What else its description is made from.
        remark: What the report says of it beside where it went.
    """

    name: str
    piece: Piece
    id: str = ""
    description: str = ""
    covers: list[tuple[str, Piece]] = field(default_factory=list)
    allows: list[tuple[str, Piece]] = field(default_factory=list)
    examples: list[tuple[str, Piece]] = field(default_factory=list)
    allowed_examples: list[tuple[str, Piece]] = field(default_factory=list)
    more: list[Piece] = field(default_factory=list)
    remark: str = ""

    @property
    def pieces(self) -> list[Piece]:
        """All pieces that it is made from."""
        pairs = (*self.covers, *self.allows, *self.examples, *self.allowed_examples)
        return [self.piece, *self.more, *(piece for _, piece in pairs)]


@dataclass(slots=True)
class Draft:
    """A policy in the making.

    Attributes:
        name: What it is called; names the rail and the variant where there are several.
        kinds: What the rail that uses it judges.
        rules: Its categories.
        exceptions: What is allowed whatever the category.
        description: What it is for.
        prefix: What ids begin with where the source has none.
    """

    name: str
    kinds: tuple[ContentKind, ...] = CONTENT_KINDS
    rules: list[Rule] = field(default_factory=list)
    exceptions: list[tuple[str, Piece]] = field(default_factory=list)
    description: str = ""
    prefix: str = "C"

    def policy(self) -> Policy:
        """The finished policy.

        Raises:
            PolicyError: It has text that no policy can have, such as control characters.
        """
        try:
            return self._policy()
        except ValidationError as error:
            said = str(error.errors(include_url=False)[0]["msg"])
            first = self.rules[0].piece.place if self.rules else self.name
            raise PolicyError(f"{first}: no policy can be made of this or of what follows: {said}.") from None

    def _policy(self) -> Policy:
        identifiers = _identifiers(self.rules, self.prefix)
        names = _distinct([_short(rule.name) for rule in self.rules], " ({})", MAX_NAME_LENGTH)
        shared = [text for text, _ in self.exceptions]
        categories = [
            Category(
                id=identifier,
                name=name,
                description=_description(rule),
                covers=_texts(rule.covers),
                allows=tuple(dict.fromkeys([*_texts(rule.allows), *shared])),
                examples=_texts(rule.examples),
                allowed_examples=_texts(rule.allowed_examples),
                applies_to=self.kinds,
            )
            for rule, identifier, name in zip(self.rules[:MAX_CATEGORIES], identifiers, names, strict=False)
        ]
        return Policy(
            name=_short(self.name),
            description=self.description,
            categories=tuple(categories),
        )

    def entries(self) -> list[Entry]:
        """Where each piece went."""
        found: list[Entry] = []
        for number, (rule, identifier) in enumerate(
            zip(self.rules, _identifiers(self.rules, self.prefix), strict=True)
        ):
            if number >= MAX_CATEGORIES:
                found += [Entry(piece) for piece in rule.pieces]
                continue
            where = f"{self.name} {identifier}"
            remark = f" ({rule.remark})" if rule.remark else ""
            found += [Entry(piece, f"{where}{remark}") for piece in (rule.piece, *rule.more)]
            for part in ("covers", "allows", "examples", "allowed_examples"):
                found += [Entry(piece, f"{where} {part}") for _, piece in getattr(rule, part)]
        found += [Entry(piece, f"{self.name} allows, in all categories") for _, piece in self.exceptions]
        return found


def _texts(pairs: Iterable[tuple[str, Piece]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text, _ in pairs if text.strip()))


def _description(rule: Rule) -> str:
    """A rule's description; with its name, where that is too long for a name."""
    line = " ".join(rule.name.split())
    if len(line) <= MAX_NAME_LENGTH or line.casefold() in rule.description.casefold():
        return rule.description
    return f"{line}. {rule.description}".strip()


def _identifiers(rules: Sequence[Rule], prefix: str) -> list[str]:
    """An id for each rule: its own where it can be one, else the next number."""
    found = []
    for number, rule in enumerate(rules, 1):
        own = re.sub(r"[\s,;<>{}\[\]\\|\u00a6]+", "-", rule.id).strip("-")[:MAX_ID_LENGTH]
        found.append(own if own and own.isprintable() else f"{prefix}{number}")
    return _distinct(found, "-{}", MAX_ID_LENGTH)


def _distinct(texts: Sequence[str], form: str, most: int) -> list[str]:
    """The same texts, with a number where one was there before."""
    taken: set[str] = set()
    following: dict[str, int] = {}
    found = []
    for text in texts:
        line = distinct = " ".join(unicodedata.normalize("NFC", text).split())
        again = following.get(line.casefold(), 2)
        while distinct.casefold() in taken:
            number = form.format(again)
            distinct, again = f"{line[: most - len(number)]}{number}", again + 1
        following[line.casefold()] = again
        taken.add(distinct.casefold())
        found.append(distinct)
    return found


def _short(name: str) -> str:
    """A name of at most as many characters as a name may have, cut between words."""
    line = " ".join(unicodedata.normalize("NFC", name).split()) or "unnamed"
    if len(line) <= MAX_NAME_LENGTH:
        return line
    return line[:MAX_NAME_LENGTH].rsplit(" ", 1)[0][:MAX_NAME_LENGTH]


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
