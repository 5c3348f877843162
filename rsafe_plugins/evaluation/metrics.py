"""How well verdicts agree with labels. Both errors, always, and what doesn't depend on a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.guard.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures for one set of items.

    Unsafe is the positive class. A failed check counts as wrong, whatever the item's label.

    Attributes:
        items: How many items.
        unsafe: How many of them are labelled unsafe.
        failures: Checks without a verdict.
        f1: Harmonic mean of precision and recall; None where nothing is labelled unsafe.
        precision: Share of unsafe verdicts that are right; None where there are none.
        recall: Share of unsafe items found; None where there are none.
        false_positive_rate: Share of safe items that were not judged safe; None where there are none.
        auroc: Area under the ROC curve of the scores, a failed check's being the worst; None where there is one label
            only, or an engine without scores.
        auprc: Average precision of the scores, likewise.
        tokens: Mean of generated tokens a check.
    """

    items: int
    unsafe: int
    failures: int
    f1: float | None
    precision: float | None
    recall: float | None
    false_positive_rate: float | None
    auroc: float | None
    auprc: float | None
    tokens: float


def measure(items: Sequence[LabelledItem], verdicts: Sequence[Verdict]) -> Metrics:
    """The figures for items and their verdicts, in the same order."""
    pairs = list(zip(items, verdicts, strict=True))
    hits = sum(item.unsafe and verdict.label == "unsafe" for item, verdict in pairs)
    false_alarms = sum(not item.unsafe and verdict.label != "safe" for item, verdict in pairs)
    unsafe = sum(item.unsafe for item in items)
    safe = len(items) - unsafe
    precision = _ratio(hits, hits + false_alarms)
    recall = _ratio(hits, unsafe)
    auroc, auprc = _areas(pairs, safe, unsafe)
    return Metrics(
        items=len(items),
        unsafe=unsafe,
        failures=sum(verdict.label is None for verdict in verdicts),
        f1=_ratio(2 * hits, hits + false_alarms + unsafe) if unsafe else None,
        precision=precision,
        recall=recall,
        false_positive_rate=_ratio(false_alarms, safe),
        auroc=auroc,
        auprc=auprc,
        tokens=mean(verdict.usage.completion_tokens for verdict in verdicts),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _areas(
    pairs: Sequence[tuple[LabelledItem, Verdict]], safe: int, unsafe: int
) -> tuple[float | None, float | None]:
    # A failed check counts as wrong here too: leaving it out would flatter the curve.
    scores = [float(not item.unsafe) if verdict.label is None else verdict.score for item, verdict in pairs]
    if not safe or not unsafe or any(score is None for score in scores):
        return None, None
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = [item.unsafe for item, _ in pairs]
    return float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))
