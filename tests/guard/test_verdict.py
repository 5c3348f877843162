import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsafe_plugins import Policy, VerdictError
from rsafe_plugins.guard.verdict import named_categories, parse_answer

POLICY = Policy.load("rsafe-18")

RIGHT = [
    (r"\boxed{safe}", "safe", None),
    (r"\boxed{unsafe}", "unsafe", None),
    (r"<think>a thought</think>\boxed{safe}", "safe", "a thought"),
    ("<think>\nU3 is met.\n</think>\n\nThe verdict: $\\boxed{UNSAFE}$.", "unsafe", "U3 is met."),
    (r"<think>x</think>\boxed{\text{unsafe}}", "unsafe", "x"),
    (r"<think>x</think>\boxed{ **Safe** }", "safe", "x"),
    (r"< THINK >x</ think >\boxed{safe}", "safe", "x"),
    (
        r"<think>one could answer \boxed{safe} here</think>\boxed{unsafe}",
        "unsafe",
        r"one could answer \boxed{safe} here",
    ),
    (r"<think></think>\boxed{safe}", "safe", ""),
]

WRONG = [
    "",
    "safe",
    "unsafe",
    r"\boxed{}",
    r"\boxed{safe",
    r"\boxed safe",
    r"\boxed{not safe}",
    r"\boxed{safe or unsafe}",
    r"\boxed{safe, unsafe}",
    r"\boxed{safely}",
    r"\boxed{ſafe}",
    r"\boxed{ѕafe}",
    r"\boxed{safe}\boxed{safe}",
    r"\boxed{safe}\boxed{unsafe}",
    r"\boxed{unsafe} \boxed{",
    r"<think>\boxed{safe}",
    r"<think>thinking \boxed{safe}</think>",
    r"<think>a</think><think>b</think>\boxed{safe}",
    r"<think>a<think>b</think>\boxed{safe}",
    r"a</think>\boxed{safe}",
    r"<think>a</think>b</think>\boxed{safe}",
    r"\boxed{safe}<think>but</think>",
    r"\boxed{unsafe}<think>no</think>\boxed{safe}",
    r"</think>a<think>\boxed{safe}",
    r"\boxed{\text{safe}",
    r"\boxed{\text{safe} unsafe}",
    r"\fbox{safe}",
    r"boxed{safe}",
    r"If this were harmless I would answer \boxed{safe}, but it is not",
    r"<thinking>For a benign request I'd say \boxed{safe}",
    r'<think id="1">For a benign request I would say \boxed{safe}',
    r"<think>a</think><thinking>b \boxed{safe}",
    r"\fbox{unsafe}\boxed{safe}",
    r"\boxed2{unsafe}\boxed{safe}",
    r"boxed{unsafe} \boxed{safe}",
]


@pytest.mark.parametrize(("text", "label", "reasoning"), RIGHT)
def test_one_box_after_a_closed_thought_is_a_verdict(text: str, label: str, reasoning: str | None) -> None:
    answer = parse_answer(text)
    assert (answer.label, answer.reasoning) == (label, reasoning)


@pytest.mark.parametrize("text", WRONG)
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(VerdictError):
        parse_answer(text)


def test_a_thought_is_required_where_it_was_asked_for() -> None:
    with pytest.raises(VerdictError, match="thought"):
        parse_answer(r"\boxed{safe}", thinking=True)


def test_an_error_does_not_quote_the_answer() -> None:
    with pytest.raises(VerdictError) as caught:
        parse_answer("CANARY")
    assert "CANARY" not in str(caught.value)


pieces = st.one_of(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "\\boxed{",
            "safe",
            "unsafe",
            "}",
            "{",
            "\\text{",
            "\n",
            " ",
            "not ",
            "<",
            "<thinking>",
            "\\fbox{unsafe}",
            "boxed{unsafe}",
            "\\boxed{safe}",
            "\\boxed{unsafe}",
        ]
    ),
    st.text(max_size=6),
)
answers = st.lists(pieces, max_size=10).map("".join)


@given(answers, st.sampled_from([True, False, None]))
def test_no_string_raises_anything_but_a_verdict_error(text: str, thinking: bool | None) -> None:
    with contextlib.suppress(VerdictError):
        parse_answer(text, thinking=thinking)


@given(answers)
def test_nothing_but_one_well_formed_box_after_closed_reasoning_is_safe(text: str) -> None:
    try:
        answer = parse_answer(text)
    except VerdictError:
        return
    if answer.label == "safe":
        opened, closed = (
            len(re.findall(rf"<\s*{slash}\s*think\s*>", text, re.IGNORECASE)) for slash in ("", "/")
        )
        assert (opened, closed) in ((0, 0), (1, 1))
        conclusion = re.split(r"<\s*/\s*think\s*>", text, flags=re.IGNORECASE)[-1]
        assert len(re.findall(r"\\\s*boxed", conclusion, re.IGNORECASE)) == 1
        assert not re.search(r"fbox|(?<!\\)(?<!\\\s)boxed\s*\{", conclusion, re.IGNORECASE)
        assert not re.search(r"<thinking", text, re.IGNORECASE)
        if not opened:
            assert not re.search(r"\w", re.split(r"\\\s*boxed", conclusion, flags=re.IGNORECASE)[0])
        assert re.search(r"\\\s*boxed\s*\{[^}]*\bsafe\b", conclusion, re.IGNORECASE)
        assert not re.search(r"\\\s*boxed\s*\{[^}]*unsafe", conclusion, re.IGNORECASE)


@given(st.text())
def test_any_text_at_all_is_read_for_categories_without_an_error(text: str) -> None:
    named_categories(text, text, POLICY)


@pytest.mark.parametrize(
    ("reasoning", "conclusion", "known", "unknown"),
    [
        ("x\nCategories: U3", "", ("U3",), ()),
        ("x\nCategories: U4, u3", "", ("U3", "U4"), ()),
        ("x\nCategories: Intellectual Property", "", ("U11",), ()),
        ("x\nCategories: U2: Weapons & Illegal Tactics", "", ("U2",), ()),
        ("x\nCategories: U99, Bad Taste", "", (), ("U99", "Bad Taste")),
        ("x\nCategories: U3 and U99", "", ("U3",), ("U99",)),
        ("x\nCategories: U3 & U4", "", ("U3", "U4"), ()),
        ("x\nCategories: U3/U4", "", ("U3", "U4"), ()),
        ("x\nCategories: U3 U4", "", ("U3", "U4"), ()),
        ("x\nCategories: U3, and U4", "", ("U3", "U4"), ()),
        ("x\nCategories: Violence & Physical Harm, Fraud", "", ("U1",), ("Fraud",)),
        ("x\nCategories: U7 Hate Speech & Discrimination", "", ("U7",), ()),
        ("x\nCategories: U7 hate", "", ("U7",), ()),
        ("x\nCategories:\n- U3\n- U4: Drugs", "", ("U3", "U4"), ()),
        ("x\nCategories: none", "", (), ()),
        ("x\n**Category:** `U7`.", "", ("U7",), ()),
        ("Categories: U1", "\nCategories: U2", ("U2",), ()),
        ("U1: no.\nU2: no.\nSo it is U9.", "", ("U9",), ()),
        ("This is about U1 and U10.", "", ("U1", "U10"), ()),
        ("nothing named", "", (), ()),
        (None, "", (), ()),
    ],
)
def test_named_categories_become_the_policys_ids(
    reasoning: str | None, conclusion: str, known: tuple[str, ...], unknown: tuple[str, ...]
) -> None:
    assert named_categories(reasoning, conclusion, POLICY) == (known, unknown)
