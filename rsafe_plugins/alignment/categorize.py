"""Names a category of `rsafe-18` for items whose source names none: a linear classifier over words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from rsafe_plugins.evaluation.items import LabelledItem


class Categorizer:
    """Learns from the items whose category is known, and guesses for the others.

    Args:
        items: Labelled items.
        category_ids: The categories of an item, best first; empty where they aren't known.
        sure: A guess less probable than this (0 to 1) is no guess.
    """

    def __init__(
        self,
        items: Sequence[LabelledItem],
        category_ids: Callable[[LabelledItem], tuple[str, ...]],
        sure: float = 0.5,
    ) -> None:
        known = [(item, ids[0]) for item in items if item.unsafe and (ids := category_ids(item))]
        self._sure = sure
        self._model: Any = None
        self._cache: dict[str, str | None] = {}
        if len({label for _, label in known}) > 1:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline

            model = make_pipeline(
                TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2),
                LogisticRegression(C=20.0, class_weight="balanced", max_iter=1000),
            )
            # Where no word stands in two texts, there is nothing to learn from.
            with suppress(ValueError):
                self._model = model.fit([_text(item) for item, _ in known], [label for _, label in known])

    def nearest(self, item: LabelledItem) -> str | None:
        """The category that comes nearest to the item's text, or None where none does with enough probability."""
        if self._model is None:
            return None
        text = _text(item)
        if text not in self._cache:
            probabilities = self._model.predict_proba([text])[0]
            best = int(probabilities.argmax())
            self._cache[text] = str(self._model.classes_[best]) if probabilities[best] >= self._sure else None
        return self._cache[text]


def _text(item: LabelledItem) -> str:
    # A response is about what its prompt is about, and often says so more plainly there.
    return f"{item.prompt} {item.response} {item.document}"[:2000]
