import random

from rsafe_plugins import Verdict
from rsafe_plugins.backends import Usage
from rsafe_plugins.evaluation.fit import LARGEST_SHARE, fit
from rsafe_plugins.evaluation.items import LabelledItem


def item(unsafe: bool) -> LabelledItem:
    return LabelledItem(id="1", task="prompt", prompt="x", label="unsafe" if unsafe else "safe")


def verdict(score: float | None, tokens: int = 0) -> Verdict:
    label = None if score is None else "unsafe"
    return Verdict(label=label, blocked=True, score=score, usage=Usage(completion_tokens=tokens))


LABELS = [False] * 50 + [True] * 50


def test_the_threshold_parts_what_can_be_parted() -> None:
    scores = [verdict(0.3 + 0.004 * n) for n in range(50)] + [verdict(0.8 + 0.001 * n) for n in range(50)]
    made = fit([item(label) for label in LABELS], scores, scores)
    assert made is not None
    assert 0.496 < made.threshold < 0.8
    assert made.never == made.always == made.adaptive == 1.0


def test_thinking_that_does_not_pay_is_left_out() -> None:
    bare = [verdict(0.9 if label else 0.1) for label in LABELS]
    thought = [verdict(0.1 if label else 0.9, tokens=50) for label in LABELS]
    made = fit([item(label) for label in LABELS], bare, thought)
    assert made is not None
    assert made.band == (made.threshold, made.threshold)
    assert (made.adaptive, made.always, made.token_share) == (1.0, 0.0, 0.0)


def test_the_band_holds_what_is_unsure_and_costs_at_most_a_third() -> None:
    chance = random.Random(0)
    bare, thought = [], []
    for label in LABELS:
        unsure = chance.random() < 0.25
        score = chance.uniform(0.45, 0.55) if unsure else chance.uniform(0.8, 0.9) if label else 0.1
        bare.append(verdict(score))
        thought.append(verdict(0.95 if label else 0.05, tokens=40))
    made = fit([item(label) for label in LABELS], bare, thought)
    assert made is not None
    assert made.never < made.adaptive
    assert made.adaptive >= made.always - 0.01
    assert 0 < made.token_share <= LARGEST_SHARE


def test_the_rarer_unsafe_items_are_in_traffic_the_higher_the_threshold() -> None:
    chance = random.Random(0)
    items = [item(label) for label in LABELS]
    scores = [verdict(min(1.0, max(0.0, chance.gauss(0.6 if label else 0.4, 0.15)))) for label in LABELS]
    thresholds = []
    for share in (0.8, None, 0.1):
        made = fit(items, scores, scores, share)
        assert made is not None
        thresholds.append(made.threshold)
    assert thresholds[0] < thresholds[1] < thresholds[2]


def test_failed_checks_are_left_out_and_one_label_alone_cannot_be_fitted() -> None:
    labels = [item(True), item(False), item(False)]
    scores = [verdict(0.9), verdict(None), verdict(0.1)]
    made = fit(labels, scores, scores)
    assert made is not None
    assert made.never == 1.0
    assert fit([item(True)] * 3, scores, scores) is None


def test_a_threshold_between_very_small_scores_is_not_rounded_away() -> None:
    scores = [verdict(1e-6)] * 50 + [verdict(4e-5)] * 50
    made = fit([item(label) for label in LABELS], scores, scores)
    assert made is not None
    assert 1e-6 < made.threshold <= 4e-5
    assert made.never == 1.0
