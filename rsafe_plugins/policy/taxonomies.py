"""Which categories of different taxonomies correspond to each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files
from rsafe_plugins.policy.model import Category, ContentKind, Policy

_HUB = "rsafe-18"
_SHORT = 4  # letters of a word that only an ending may follow
_BY_NAME = ("openai", "beavertails")  # taxonomies whose categories are known by their names


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("rsafe_plugins.policy").joinpath("taxonomies.yaml").read_text("utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table


def taxonomy_names() -> tuple[str, ...]:
    """The names of the taxonomies that the table knows."""
    return tuple(_table()["taxonomies"])


def corresponding(category: str, taxonomy: str, to: str) -> tuple[str, ...]:
    """The categories of one taxonomy that correspond to a category of another.

    Args:
        category: Its id, or its name where the taxonomy has no ids or its data set gives names.
        taxonomy: The taxonomy that it belongs to, one of `taxonomy_names()`.
        to: The taxonomy in question.

    Returns:
        Their ids; none where nothing corresponds.

    Raises:
        PolicyError: There is no such taxonomy.
    """
    for name in (taxonomy, to):
        if name not in taxonomy_names():
            raise PolicyError(f"There is no taxonomy {files.choices(name, taxonomy_names())}.")
    category = _table()["names"].get(taxonomy, {}).get(category, category)
    found: dict[str, None] = {}
    for hub, row in _table()["rows"].items():
        if category in ([hub] if taxonomy == _HUB else row.get(taxonomy, ())):
            found.update(dict.fromkeys([hub] if to == _HUB else row.get(to, ())))
    return tuple(found)


def left_out(policy: Policy, kind: ContentKind) -> tuple[Category, ...]:
    """The categories of `rsafe-18` that a policy leaves out for a kind of content.

    Its own are recognized by their names where these are of one of the taxonomies. Another one is recognized if each
    word of its name is one of the table's, and is taken for whatever the words in all that it says could mean.

    Returns:
        The categories in the order of `rsafe-18`; none where the policy has all of them, or one isn't recognized, which
        could mean anything.
    """
    has = [_recognized(category) for category in policy.categories if kind in category.applies_to]
    if not has or not all(has):
        return ()
    return tuple(one for one in _hub().categories if not any(one.id in ids for ids in has))


def in_short(category: Category) -> Category:
    """A category as a model that was trained on `rsafe-18` needs to be told: of one of these the name alone."""
    if category not in _hub().categories:
        return category
    return Category(id=category.id, name=category.name, applies_to=category.applies_to)


@cache
def _hub() -> Policy:
    return Policy.load(_HUB)


def _recognized(category: Category) -> frozenset[str]:
    """The categories of `rsafe-18` that it could mean, by their ids; none where nobody can say."""
    name = _plain(category.name)
    own = {one.id: one.description for one in _hub().categories if _plain(one.name) == name}
    more = [category.description, *category.covers, *category.examples]
    if own and not {*more} - {*own.values(), ""}:
        return frozenset(own)
    known = _names().get(name, frozenset()) | _names().get(_plain(category.id), frozenset()) | own.keys()
    said = " ".join([name, *map(_plain, more)])
    if _open().search(said):
        return frozenset()
    if not known:
        rest = name
        for words in _words().values():
            rest = words.sub("", rest)
        if rest == name or not {*rest.split()} <= {*_table()["fillers"].split()}:
            return frozenset()
        if not {*said.split()}.isdisjoint(_table()["broad"].split()):
            return frozenset()
    return known | {one for one, words in _words().items() if words.search(said)}


@cache
def _open() -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(_table()['open'])})\b")


@cache
def _words() -> Mapping[str, re.Pattern[str]]:
    """What recognizes each category of `rsafe-18`."""
    found = {}
    for one, row in _table()["rows"].items():
        forms = [
            rf"{word}\w*" if len(word) > _SHORT else rf"{word}(?:e?s|e?d|ing|ers?)?"
            for word in row["words"].split()
        ]
        found[one] = re.compile(rf"\b(?:{'|'.join(forms).replace('-', ' ')})\b")
    return found


def _plain(text: str) -> str:
    """In small letters, with single spaces between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


@cache
def _names() -> Mapping[str, frozenset[str]]:
    """The categories of other taxonomies, by name, and those of `rsafe-18` that correspond to them."""
    named = [
        (one.name, corresponding(one.id, "mlcommons", _HUB)) for one in Policy.load("mlcommons").categories
    ]
    for taxonomy in _BY_NAME:
        names = {name for row in _table()["rows"].values() for name in row.get(taxonomy, ())}
        named.extend((name, corresponding(name, taxonomy, _HUB)) for name in names)
    found: dict[str, frozenset[str]] = {}
    for name, ids in named:
        found[_plain(name)] = found.get(_plain(name), frozenset()) | frozenset(ids)
    return found
