"""Policies in files of other guards, in plain text, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.testing import FakeLLMModel

from rsafe_plugins import Policy, PolicyError
from rsafe_plugins.policy.condense import condensed, length
from rsafe_plugins.policy.taxonomies import corresponding, taxonomy_names
from rsafe_plugins.policy.translate import Translation, translate
from rsafe_plugins.policy.translate.write import llama_guard_prompt, nemo_config, safeguard_policy, together


def of(folder: Path, text: str, name: str = "mine.txt") -> Translation:
    path = folder / name
    path.write_text(text)
    return translate(path)


def only(translation: Translation) -> Policy:
    (policy,) = translation.policies.values()
    return policy


SAFEGUARD = """# Spam Policy

## INSTRUCTIONS
Classify the content. Return 0 or 1.

## DEFINITIONS
Spam: unsolicited bulk content.

## VIOLATES (1)
- Bulk promotion of products
- Phishing links

## DOES NOT VIOLATE (0)
- A single announcement

## EXAMPLES
- "BUY NOW!!! http://x" -> 1
- Content: Our shop opens on Monday.
  Answer: 0
"""


def test_a_safeguard_policy_is_a_category_with_examples(tmp_path: Path) -> None:
    translation = of(tmp_path, SAFEGUARD, "spam.md")
    assert translation.format == "gpt-oss-safeguard"
    (spam,) = only(translation).categories
    assert spam.name == "Spam"
    assert spam.description == "Spam: unsolicited bulk content."
    assert spam.covers == ("Bulk promotion of products", "Phishing links")
    assert spam.allows == ("A single announcement",)
    assert spam.examples == ("BUY NOW!!! http://x",)
    assert translation.unplaced == []


def test_a_list_of_categories(tmp_path: Path) -> None:
    translation = of(
        tmp_path, "S1: Violent Crimes.\nAI models should not help with violent crimes.\nS2: Sex Crimes.\n"
    )
    assert translation.format == "taxonomy"
    first, second = only(translation).categories
    assert (first.id, first.name, first.covers) == ("S1", "Violent Crimes", ("help with violent crimes",))
    assert (second.id, second.name) == ("S2", "Sex Crimes")


@pytest.mark.parametrize(
    "text", ["hate\nself-harm/intent\nSexual/Minors\n", "- hate\n- self_harm/intent\n- sexual/minors"]
)
def test_names_of_openais_categories(tmp_path: Path, text: str) -> None:
    translation = of(tmp_path, text)
    assert translation.format == "names"
    assert [one.id for one in only(translation).categories] == ["hate", "self-harm/intent", "sexual/minors"]
    assert all(one.description for one in only(translation).categories)


def test_names_of_perspectives_categories(tmp_path: Path) -> None:
    assert [one.name for one in only(of(tmp_path, "TOXICITY\nTHREAT")).categories] == ["Toxicity", "Threat"]


RAIL = """<rail version="0.1">
<output>
  <string name="x" validators="guardrails/toxic_language: 0.5; guardrails/detect_pii: ['EMAIL']; length: 1 10"/>
</output>
<prompt>Write something.</prompt>
</rail>
"""


def test_a_spec_of_guardrails_ai(tmp_path: Path) -> None:
    translation = of(tmp_path, RAIL, "mine.rail")
    assert translation.format == "guardrails-ai"
    assert [(one.name, one.covers) for one in only(translation).categories] == [
        ("Toxic language", ()),
        ("Personal data", ("EMAIL",)),
    ]
    assert {entry.reason for entry in translation.report if not entry.went} == {
        "a validator that checks form or quality, not safety",
        "a prompt or an instruction to the main model",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<rail><output>", "this is no XML"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><rail version="0.1"/>', "entities of its own"),
    ],
)
def test_a_bad_spec_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        of(tmp_path, text, "mine.rail")


def test_bullets_under_headings_are_what_their_heading_says(tmp_path: Path) -> None:
    text = "# Our rules\n\n## Not allowed\n- Spam\n- Insults\n\n## Allowed\n- Criticism of products\n"
    policy = only(of(tmp_path, text, "rules.md"))
    assert [(one.name, one.allows) for one in policy.categories] == [
        ("Spam", ("Criticism of products",)),
        ("Insults", ("Criticism of products",)),
    ]


def test_rules_line_by_line(tmp_path: Path) -> None:
    translation = of(tmp_path, "Users must not post spam.\nSelling is prohibited.\nHave fun.\n")
    assert [one.description for one in only(translation).categories] == [
        "Messages that post spam.",
        "Messages with selling.",
    ]
    assert [entry.reason for entry in translation.report if entry.reason] == [
        "neither forbids, allows nor demands anything"
    ]


def test_a_format_that_is_named_is_used(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("S1: Violence.\nS2: Hate.\n")
    with pytest.raises(PolicyError, match="there is no policy in it: read as text"):
        translate(path, format="text")


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"x" * 2_000_000, b""])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(raw)
    with pytest.raises(PolicyError) as raised:
        translate(path)
    assert "\n" not in str(raised.value)


# The way back


@pytest.mark.parametrize("name", Policy.builtin_names())
def test_what_is_written_for_other_guards_reads_back_as_much(tmp_path: Path, name: str) -> None:
    policy = Policy.load(name)
    back = only(of(tmp_path, llama_guard_prompt(policy), "llama.txt"))
    assert [one.name for one in back.categories] == [one.name for one in policy.categories]
    assert [one.allows for one in back.categories] == [one.allows for one in policy.categories]
    (whole,) = only(of(tmp_path, safeguard_policy(policy), "safeguard.md")).categories
    assert len(whole.covers) == len(policy.categories) + sum(len(one.covers) for one in policy.categories)


def test_a_config_that_is_written_loads_and_judges(tmp_path: Path) -> None:
    written = nemo_config([Policy.load("mlcommons"), Policy.load("prompt-injection")], tmp_path / "made")
    assert {path.name for path in written} >= {"config.yml", "policy-input.yaml"}
    config = RailsConfig.from_path(str(tmp_path / "made"))
    config.models = []
    config.custom_data["rsafe"]["backend"] = "embedded"
    LLMRails(config, llm=FakeLLMModel(responses=["hi"]))
    with pytest.raises(PolicyError, match="there is a config already"):
        nemo_config([Policy.load("mlcommons")], tmp_path / "made")


def test_two_policies_together_tell_their_ids_apart() -> None:
    mine = Policy.load("mlcommons")
    both = together(mine, mine)
    assert len(both.categories) == 2 * len(mine.categories)


# What corresponds, and what fits


def test_every_category_of_the_paper_and_of_beavertails_is_in_the_table() -> None:
    for category in Policy.load("rsafe-18").categories:
        assert corresponding(category.id, "rsafe-18", "rsafe-18") == (category.id,)
    for category in Policy.load("mlcommons").categories:
        found = corresponding(category.id, "mlcommons", "rsafe-18")
        assert found or category.id in ("S5", "S14"), category.name  # defamation, code interpreter abuse
    assert corresponding("S11", "mlcommons", "openai-codes") == ("SH",)
    assert corresponding("self_harm", "beavertails", "rsafe-18") == ("U9",)
    with pytest.raises(PolicyError, match="There is no taxonomy"):
        corresponding("S1", "mlcommon", "rsafe-18")
    assert len(taxonomy_names()) == 6


def test_a_policy_that_is_too_long_loses_examples_and_nothing_else() -> None:
    policy = Policy.load("mlcommons")
    examples = tuple(f"This is the example with the number {number}." for number in range(100))
    first = policy.categories[0].model_copy(update={"examples": examples, "allowed_examples": examples})
    long = policy.model_copy(update={"categories": (first, *policy.categories[1:])})
    assert condensed(long, 100_000) == (long, 0)
    fitting, dropped = condensed(long, 1500)
    assert dropped > 0
    assert length(fitting) <= 1500 * 4
    assert fitting.categories[0].examples == examples[: len(fitting.categories[0].examples)]
    bare, dropped = condensed(long, 1)
    assert dropped == 200
    assert bare.digest == policy.digest
