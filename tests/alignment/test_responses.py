"""Responses that are made of what the data has."""

from __future__ import annotations

import random
from collections import Counter

from rsafe_plugins.alignment.responses import crossed
from rsafe_plugins.evaluation.items import LabelledItem


def item(identifier: str, label: str, prompt: str, response: str = "", **more: object) -> LabelledItem:
    return LabelledItem.model_validate(
        {
            "id": identifier,
            "task": "response" if response else "prompt",
            "prompt": prompt,
            "response": response,
            "label": label,
            **more,
        }
    )


TALE = "Tell me a tale of two foxes who found a lantern in the snow."
HARMLESS = [item("tale", "safe", TALE), item("hello", "safe", "Hello!")]
HARMFUL = [item(f"harm-{n}", "unsafe", f"Help me to do harm number {n}.") for n in range(4)]
COMPLIED = [
    item(f"complied-{n}", "unsafe", "Harm?", f"Harm is done so: {n}.", categories=("Violent Crimes",))
    for n in range(3)
]
DECLINED = [item("declined", "safe", "Harm?", "I won't help with that.")]
DOCUMENT = LabelledItem(id="page", task="document", document="a page", label="safe")
ITEMS = [*HARMLESS, *HARMFUL, *COMPLIED, *DECLINED, DOCUMENT]


def test_the_response_decides_and_not_what_was_asked() -> None:
    made = crossed(ITEMS, 100, random.Random(0))
    assert len({one.id for one in made}) == len(made) == 2 * 2 * len(COMPLIED)
    unsafe, safe = made[::2], made[1::2]
    assert {one.task for one in made} == {"response"}
    assert Counter((one.label, one.categories) for one in unsafe) == {("unsafe", ("Violent Crimes",)): 6}
    assert {one.response for one in unsafe} == {one.response for one in COMPLIED}
    assert {one.prompt for one in unsafe} <= {one.prompt for one in HARMLESS}
    assert {(one.label, one.categories) for one in safe} == {("safe", ())}
    assert {one.prompt for one in safe} <= {one.prompt for one in HARMFUL}
    assert Counter(one.response for one in safe) == {TALE: 3, "I won't help with that.": 3}


def test_no_more_are_made_than_asked_for_and_a_seed_makes_the_same() -> None:
    made = crossed(ITEMS, 5, random.Random(0))
    assert [one.label for one in made] == ["unsafe", "safe"] * 2
    assert made == crossed(ITEMS, 5, random.Random(0))
    assert crossed(ITEMS, 0, random.Random(0)) == []


def test_harmless_prompts_answer_where_no_harmless_responses_are() -> None:
    made = crossed([*HARMLESS, *HARMFUL, *COMPLIED], 100, random.Random(0))
    assert {one.response for one in made if not one.unsafe} == {TALE}


def test_none_are_made_of_too_little() -> None:
    for left_out in (HARMLESS, HARMFUL, COMPLIED):
        some = [one for one in ITEMS if one not in left_out]
        assert crossed(some, 100, random.Random(0)) == []
    assert crossed([HARMLESS[1], *HARMFUL, *COMPLIED], 100, random.Random(0)) == [], "too short a passage"
