"""Which categories of different taxonomies correspond to each other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import files

_HUB = "rsafe-18"


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
        category: Its id, or its name where the taxonomy has no ids.
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
    found: dict[str, None] = {}
    for hub, row in _table()["rows"].items():
        if category in ([hub] if taxonomy == _HUB else row.get(taxonomy, ())):
            found.update(dict.fromkeys([hub] if to == _HUB else row.get(to, ())))
    return tuple(found)
