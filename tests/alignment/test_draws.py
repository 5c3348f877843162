import random
from itertools import pairwise

import pytest

from rsafe_plugins import Policy
from rsafe_plugins.alignment.draws import Draws, DrawSampler, place_of
from rsafe_plugins.alignment.examples import category_ids, label_under, policy_variant
from rsafe_plugins.alignment.recipe import PolicyMix
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.items import LabelledItem

pytestmark = pytest.mark.align

CHANGED = PolicyMix(whole=0.0, names=0.2, reworded=0.2, user_words=0.5, distractors=0.5)


def item(number: int, label: str, *categories: str, task: str = "prompt") -> LabelledItem:
    return LabelledItem.model_validate(
        {"id": str(number), "task": task, task: f"text {number}", "label": label, "categories": categories}
    )


ITEMS = [
    *(item(n, "unsafe", ["Hate", "Suicide & Self-Harm", "Privacy"][n % 3]) for n in range(6)),
    *(item(n, "safe") for n in range(6, 11)),
    item(11, "unsafe"),
    item(12, "unsafe", task="document"),
]


def sampler(
    draws: Draws, steps: int, solved: dict[int, list[int]] | None = None, batch: int = 4
) -> DrawSampler:
    return DrawSampler(draws, batch=batch, steps=steps, group_size=2, copies=3, seed=0, solved=solved)


def items_of(rows: list[int]) -> list[int]:
    return [place_of(row, len(ITEMS))[1] for row in rows]


def test_each_item_has_a_policy_of_its_own_and_another_in_the_next_pass() -> None:
    draws = Draws(ITEMS, PolicyMix(whole=0.0, distractors=0.5), paired=False, seed=0)
    first = [draws.draw(0, index)[0].policy for index in range(11)]
    second = [draws.draw(1, index)[0].policy for index in range(11)]
    assert len({policy.digest for policy in first}) == 11
    assert all(one.digest != other.digest for one, other in zip(first, second, strict=True))


def test_the_label_is_what_the_items_category_is_under_its_policy() -> None:
    draws = Draws(ITEMS, CHANGED, paired=False, seed=0)
    labels = {draws.draw(epoch, 0)[0].label for epoch in range(30)}
    assert labels == {"safe", "unsafe"}
    assert {draws.draw(epoch, 7)[0].label for epoch in range(30)} == {"safe"}


def test_an_unsafe_item_of_unknown_category_is_judged_by_the_whole_policy_alone() -> None:
    mix = PolicyMix(whole=0.0, names=0.0, reworded=0.0)
    draws = Draws(ITEMS, mix, paired=True, seed=0)
    for epoch in range(5):
        (one,) = draws.draw(epoch, 11)
        assert (one.label, one.policy.categories, one.pair) == (
            "unsafe",
            Policy.load("rsafe-18").categories,
            "",
        )


def test_a_document_is_judged_for_injected_instructions() -> None:
    (one,) = Draws(ITEMS, CHANGED, paired=True, seed=0).draw(0, 12)
    assert (one.label, one.policy.name) == ("unsafe", "prompt-injection")


def test_a_pair_is_one_text_under_a_policy_with_and_without_its_categories() -> None:
    draws = Draws(ITEMS, CHANGED, paired=True, seed=0)
    for epoch in range(20):
        with_it, without_it = draws.draw(epoch, 0)
        assert (with_it.label, without_it.label) == ("unsafe", "safe")
        assert with_it.pair == without_it.pair != draws.draw(epoch, 1)[0].pair
        kept = {category.id for category in without_it.policy.categories}
        removed = [category for category in with_it.policy.categories if category.id not in kept]
        assert kept
        assert kept < {category.id for category in with_it.policy.categories}
        assert 1 <= len(removed) <= len(category_ids(ITEMS[0]))


def test_both_sides_of_a_pair_lack_categories_so_that_a_gap_says_nothing() -> None:
    draws = Draws(ITEMS, PolicyMix(whole=1.0), paired=True, seed=0)
    assert all(len(draws.draw(epoch, 0)[0].policy.categories) < 18 for epoch in range(10))


def test_distractors_are_categories_that_no_id_of_the_policy_stands_for() -> None:
    chance = random.Random(0)
    variants = [policy_variant(chance, PolicyMix(whole=0.0, names=0.0, distractors=1.0)) for _ in range(20)]
    for variant in variants:
        extra = {category.id for category in variant.policy.categories} - set(variant.ids.values())
        assert 1 <= len(extra) <= 3
        assert label_under(item(0, "safe"), variant) == "safe"


def test_a_users_words_are_no_other_words() -> None:
    chance = random.Random(0)
    mine = policy_variant(chance, PolicyMix(whole=0.0, names=0.0, reworded=1.0, user_words=1.0))
    plain = {
        category.name
        for _ in range(50)
        for category in policy_variant(
            chance, PolicyMix(whole=0.0, names=0.0, reworded=1.0)
        ).policy.categories
    }
    assert not plain & {category.name for category in mine.policy.categories}
    assert mine.whole


def test_taking_away_every_category_is_refused() -> None:
    variant = policy_variant(random.Random(0), PolicyMix(whole=1.0))
    with pytest.raises(ValueError, match="at least one category"):
        variant.without(variant.ids)


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([item(0, "unsafe", "Rudeness"), item(1, "safe")], "item 0 has the category 'Rudeness'"),
        ([item(0, "unsafe"), item(1, "safe")], "none of the 2 items does"),
    ],
)
def test_items_that_cannot_be_drawn_are_refused(items: list[LabelledItem], says: str) -> None:
    with pytest.raises(DataError, match=says):
        Draws(items, PolicyMix(), paired=True, seed=0)


def test_a_step_holds_whole_pairs_side_by_side_before_what_is_single() -> None:
    draws = Draws(ITEMS, CHANGED, paired=True, seed=0)
    for rows in sampler(draws, 12).prompts():
        assert len(rows) == len(set(rows)) == 4
        sides = [draws.sides(index) for index in items_of(rows)]
        assert sides == sorted(sides, reverse=True)
        pairs = rows[: sides.count(2)]
        assert all(second == first + 1 for first, second in zip(pairs[::2], pairs[1::2], strict=True))


def test_a_pass_holds_every_item_once() -> None:
    draws = Draws(ITEMS, CHANGED, paired=False, seed=0)
    rows = [row for step in sampler(draws, 2, batch=13).prompts() for row in step]
    assert sorted(items_of(rows[:13])) == sorted(items_of(rows[13:])) == list(range(13))
    assert items_of(rows[:13]) != items_of(rows[13:])


def test_a_prompt_is_repeated_for_its_group_and_a_step_for_each_part_of_the_gradient() -> None:
    one = sampler(Draws(ITEMS, CHANGED, paired=True, seed=0), 2)
    indices = list(one)
    assert len(indices) == len(one) == 2 * 4 * 2 * 3
    assert indices[:8] == indices[8:16] == indices[16:24] != indices[24:32]
    assert indices[0] == indices[1] != indices[2]


def test_a_solved_item_sits_out_the_next_pass_and_comes_back() -> None:
    draws = Draws(ITEMS, CHANGED, paired=False, seed=0)
    solved = {0: [3]}
    steps = [set(items_of(rows)) for rows in sampler(draws, 39, solved, batch=1).prompts()]
    drawn_at = [step for step, items in enumerate(steps) if 3 in items]
    ordinary = [
        step
        for step, rows in enumerate(sampler(draws, 39, {}, batch=1).prompts())
        if 3 in set(items_of(rows))
    ]
    assert len(ordinary) == 3
    assert len(drawn_at) == 2
    assert drawn_at[0] == ordinary[0]
    assert all(later - earlier > 13 for earlier, later in pairwise(drawn_at))


def test_passes_go_on_where_every_item_is_solved() -> None:
    draws = Draws(ITEMS, CHANGED, paired=True, seed=0)
    solved = {step: list(range(len(ITEMS))) for step in range(40)}
    assert len(list(sampler(draws, 40, solved).prompts())) == 40


def test_a_run_taken_up_again_draws_what_it_would_have_drawn() -> None:
    draws = Draws(ITEMS, CHANGED, paired=False, seed=0)
    known: dict[int, list[int]] = {}
    order = []
    for step, rows in enumerate(sampler(draws, 30, known).prompts()):
        order.append(rows)
        # A data loader draws a step before it is known what came of the last.
        if step:
            known[step - 1] = items_of(order[step - 1])[:2]
    assert list(sampler(draws, 30, known).prompts()) == order
    assert list(sampler(draws, 30).prompts()) != order
