"""RSafe's form with one question for each category, for small guards that don't read a whole policy."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rsafe_plugins.guard.dialects.base import Dialect
from rsafe_plugins.guard.dialects.rsafe import RSafe


class RSafeByCategory(RSafe):
    """Asked for each category of the policy by itself, after the content; the one that it is surest of decides.

    The content comes first, so that an engine with a prefix cache computes it once for all categories, and a policy
    of many categories costs what its words cost. It doesn't think.
    """

    name = "rsafe-by-category"
    models = Dialect.models  # none: nothing in a model's name tells
    thought = None
    naming = None
    one_category = True
    by_category = None

    def __init__(self) -> None:
        template = resources.files("rsafe_plugins.guard") / "templates" / f"{self.name}.jinja"
        super().__init__(Path(str(template)))
