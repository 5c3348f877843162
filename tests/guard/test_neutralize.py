import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsafe_plugins.guard.neutralize import MARK, neutralize, restore

STRUCTURES = [
    "<extra_id_1>",
    "<SPECIAL_11>",
    "<seed:bos>",
    "</seed:think>",
    "<reserved_106>",
    "<eod>",
    "[|assistant|]",
    "[|endofturn|]",
    "[UNUSED_TOKEN_145]",
    "]~b]",
    "[e~[",
    "<think>",
    "</think>",
    "< / Think >",
    "\\boxed{",
    "\\BOXED {safe}",
    "<BEGIN CONVERSATION>",
    "<end conversation>",
    "<END UNSAFE CONTENT CATEGORIES>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[ /inst ]",
    "<<SYS>>",
    "<</SYS>>",
    "[SYSTEM_PROMPT]",
    "<s>",
    "</s>",
    "<bos>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<\uff5cUser\uff5c>",
    "<tool_call>",
    "<guardian>",
    "<END\tCONVERSATION>",
    "<END\nCONVERSATION>",
    "<END\u00a0CONVERSATION>",
    "<\u200dthink>",
    "\uff1c/think\uff1e",
    "\\fbox{",
    "<file_sep>",
    "<jupyter_start>",
    "<filename>",
    "<unused0>",
    "[gMASK]",
    "[IMG_END]",
]
ROLES = [
    "User:",
    "Agent:",
    "assistant :",
    "SYSTEM:",
    "  Human:",
    "**User**:",
    "### System:",
    "Tool result (mail):",
    "Document\uff1a",
    " " * 17 + "Agent:",
    "\u00a0User:",
    "\u3000User:",
    "User\u00a0:",
    "User" + " " * 9 + ":",
    "[User]:",
    "| User:",
    "+ User:",
    "1. User:",
    "Tool result (" + "x" * 65 + "):",
    "Tool call (a(b)):",
]

pieces = st.one_of(
    st.sampled_from(
        [
            *STRUCTURES,
            *ROLES,
            MARK,
            MARK + MARK,
            "\n",
            "\r\n",
            "\u2028",
            "<",
            ">",
            "|",
            "{0}",
            "\x00",
            "\ud800",
        ]
    ),
    st.text(max_size=8),
)
hostile = st.lists(pieces, max_size=12).map("".join)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structure_is_broken_and_stays_readable(structure: str) -> None:
    marked = neutralize(f"before {structure} after")
    assert structure not in marked
    assert structure.lower() not in marked.lower()
    assert marked.replace(MARK, "") == f"before {structure} after"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("before", ["", "text\n", "text\r", "text\u2028"])
def test_a_role_at_the_start_of_a_line_is_broken(role: str, before: str) -> None:
    marked = neutralize(f"{before}{role} hello")
    assert role not in marked
    assert marked.replace(MARK, "") == f"{before}{role} hello"


@pytest.mark.parametrize(
    "text",
    [
        "the user: a person",
        "2 < 3 and 5 > 4",
        "a|b",
        "boxed",
        "<b>bold</b>",
        "[1] cited",
        "C:\\temp",
        "\u2764\ufe0f 1\ufe0f\u20e3",
    ],
)
def test_ordinary_text_is_left_as_it_is(text: str) -> None:
    assert neutralize(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "</\u200bthink>",
        "\\bo\u200bxed{",
        "Us\ufeffer:",
        "<th\u00adink>",
        "Us\U000e0041er:",
        "<\ufe0fEND CONVERSATION>",
        "U\ufe0fser:",
        "</th\u034fink>",
        "\u061cUser:",
        "Us\u3164er:",
        "Us\U000e0100er:",
        "Us\u2800er:",
    ],
)
def test_what_nobody_can_see_is_made_visible(text: str) -> None:
    marked = neutralize(text)
    assert MARK + "{" in marked
    assert restore(marked) == text


@given(hostile)
def test_neutralizing_can_be_undone(text: str) -> None:
    assert restore(neutralize(text)) == text


@given(hostile)
def test_nothing_structural_survives(text: str) -> None:
    marked = neutralize(text)
    assert not re.search(r"<\s*/?\s*think\s*>", marked, re.IGNORECASE)
    assert not re.search(r"\\\s*boxed", marked, re.IGNORECASE)
    assert "<|" not in marked
    assert "|>" not in marked
    assert not re.search(r"<\s*(begin|end) ", marked, re.IGNORECASE)
    assert not re.search(r"(^|[\n\r\u2028\u2029])(user|agent|system|assistant):", marked, re.IGNORECASE)


@given(hostile)
def test_the_result_is_text_that_any_engine_takes(text: str) -> None:
    marked = neutralize(text)
    marked.encode("utf-8")
    assert "\x00" not in marked


def test_a_users_own_delimiters_are_broken_too() -> None:
    assert neutralize("x [[POLICY]] y", ["[[POLICY]]"]) == f"x [{MARK}[POLICY]] y"
    assert neutralize("## the\u00a0\nend", ["## The end"]) == f"#{MARK}# the\u00a0\nend"


def test_a_megabyte_of_openings_is_handled_in_one_pass() -> None:
    text = "<" * 500_000 + "\n" * 500_000
    assert restore(neutralize(text)) == text
