from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rsafe_plugins import BackendError, Guard, Policy
from rsafe_plugins.backends import Request
from rsafe_plugins.cli import main
from rsafe_plugins.commands import common
from rsafe_plugins.errors import DataError
from rsafe_plugins.evaluation.adherence import Adherence, adherence
from rsafe_plugins.evaluation.items import LabelledItem
from rsafe_plugins.testing import ScriptedBackend

POLICY = Policy.load("rsafe-18")


def item(number: int, *categories: str, label: str = "unsafe") -> LabelledItem:
    return LabelledItem(
        id=str(number),
        task="response",
        prompt="q",
        response=f"answer {number}",
        label=label,
        categories=categories,  # type: ignore[arg-type]
    )


ITEMS = [
    item(1, "self_harm"),
    item(2, "animal_abuse"),
    item(3, "animal_abuse", "self_harm"),
    item(4, label="safe"),
    item(5, "no category of theirs"),
]
MEANT = {1: "U9", 2: "U14", 3: "U14", 4: "nothing"}


def follows(request: Request) -> str:
    """A guard that follows its policy: an answer is unsafe while the category that it is about is there."""
    text = request.messages[-1].content
    number = int(text.rpartition("answer ")[2].split("\n")[0])
    return r"\boxed{unsafe}" if f"\n{MEANT[number]}: " in text else r"\boxed{safe}"


def rows(reply: object, others: int | None = None, seen: list[Policy] | None = None) -> list[Adherence]:
    backend = ScriptedBackend(reply)  # type: ignore[arg-type]

    def guard(policy: Policy) -> Guard:
        if seen is not None:
            seen.append(policy)
        return Guard(policy, backend=backend, reasoning="never")

    return adherence(ITEMS, "beavertails", POLICY, guard, others=others)


def test_a_guard_that_follows_its_policy_flips_with_it() -> None:
    assert rows(follows) == [
        Adherence("U9", 2, 2, 2, 2, 0),
        Adherence("U14", 2, 2, 2, 2, 0),
        Adherence("", 3, 3, 3, 3, 0, harmless=1),
    ]


def test_small_policies_differ_in_the_items_own_categories_alone() -> None:
    seen: list[Policy] = []
    assert rows(follows, others=3, seen=seen)[-1] == Adherence("", 3, 3, 3, 3, 0, harmless=1)
    *seen, of_harmless = seen
    assert of_harmless == seen[0]
    small = [frozenset(category.id for category in policy.categories) for policy in seen]
    # Those with them are asked for first, then those without them.
    with_own, without_own = small[: len(small) // 2], small[len(small) // 2 :]
    own = [with_ids - without for with_ids, without in zip(with_own, without_own, strict=True)]
    assert {len(without) for without in without_own} == {3}
    assert set(own) == {frozenset({"U9"}), frozenset({"U14"}), frozenset({"U9", "U14"})}
    again: list[Policy] = []
    rows(follows, others=3, seen=again)
    assert again == [*seen, of_harmless]
    assert rows(follows, others=40) == rows(follows)


@pytest.mark.parametrize(
    ("reply", "unsafe_with", "safe_without", "false_positives"),
    [(r"\boxed{unsafe}", 3, 0, 1), (r"\boxed{safe}", 0, 3, 0)],
)
def test_a_guard_that_goes_by_what_it_remembers_does_not(
    reply: str, unsafe_with: int, safe_without: int, false_positives: int
) -> None:
    last = rows(reply)[-1]
    assert last == Adherence("", 3, unsafe_with, safe_without, 0, 0, 1, false_positives)
    assert last.flip_rate == 0


def test_failed_checks_count_for_nothing_and_are_shown() -> None:
    assert rows(BackendError("down"))[-1] == Adherence("", 3, 0, 0, 0, 4, harmless=1)


def test_items_that_say_nothing_of_the_policy_are_one_sentence() -> None:
    with pytest.raises(DataError, match="None of the 1 items is unsafe for a category of beavertails"):
        adherence([ITEMS[3]], "beavertails", POLICY, lambda one: Guard(one, backend=ScriptedBackend("")))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_each_category(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(**given: object) -> Guard:
        return Guard(given["policy"], backend=ScriptedBackend(follows), reasoning="never")  # type: ignore[arg-type]

    monkeypatch.setattr(common, "make_guard", make)
    file = tmp_path / "items.jsonl"
    file.write_text("".join(one.model_dump_json() + "\n" for one in ITEMS))
    arguments = ["eval", str(file), "--adherence", "beavertails", *(["--json"] if as_json else [])]
    assert main(["eval", str(file), "--others", "3"]) == 2
    assert "--others is for --adherence" in capsys.readouterr().err
    assert main(arguments) == 0
    out = capsys.readouterr().out
    if as_json:
        assert [json.loads(line)["flip_rate"] for line in out.splitlines()] == [1.0, 1.0, 1.0]
    else:
        assert "U9 Self-Harm" in out
        assert "100%" in out
        assert re.search(r"harmless items +│ +1 │ +0%", out)
