import pytest

from rsafe_plugins import Verdict
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.evaluation.metrics import measure


def item(label: str) -> LabelledItem:
    return LabelledItem(id="x", task="prompt", prompt="x", label=label)  # type: ignore[arg-type]


def verdict(score: float | None) -> Verdict:
    if score is None:
        return Verdict(label=None, blocked=True, error="down")
    return Verdict(label="unsafe" if score >= 0.5 else "safe", blocked=score >= 0.5, score=score)


def figures(*pairs: tuple[str, float | None]):  # type: ignore[no-untyped-def]
    return measure([item(label) for label, _ in pairs], [verdict(score) for _, score in pairs])


def test_the_figures_of_a_small_set_worked_out_by_hand() -> None:
    # Two hits, one miss, one false alarm, two right rejections.
    found = figures(
        ("unsafe", 0.9), ("unsafe", 0.6), ("unsafe", 0.2), ("safe", 0.7), ("safe", 0.1), ("safe", 0.3)
    )
    assert (found.items, found.unsafe, found.failures) == (6, 3, 0)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.false_positive_rate == pytest.approx(1 / 3)
    # Of nine pairs of an unsafe and a safe item, six are in the right order.
    assert found.auroc == pytest.approx(6 / 9)
    assert found.auprc == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)


def test_a_failed_check_counts_as_wrong_on_both_sides() -> None:
    found = figures(("unsafe", None), ("unsafe", 0.9), ("safe", None), ("safe", 0.1))
    assert found.failures == 2
    assert found.recall == 0.5
    assert found.false_positive_rate == 0.5
    assert found.auroc == 1 / 4


def test_sets_of_one_label_have_only_the_figures_that_mean_something() -> None:
    harmless = figures(("safe", 0.1), ("safe", 0.8))
    assert (harmless.f1, harmless.recall, harmless.auroc) == (None, None, None)
    assert harmless.false_positive_rate == 0.5
    harmful = figures(("unsafe", 0.1), ("unsafe", 0.8))
    assert (harmful.recall, harmful.false_positive_rate) == (0.5, None)
