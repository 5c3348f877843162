"""Policies in files of other guards, in plain text, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.testing import FakeLLMModel

from rsafe_plugins import Category, Policy, PolicyError
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


# Nothing gets the wrong polarity


@pytest.mark.parametrize(
    ("sentence", "description"),
    [
        ("can never contain links", "Messages that contain links."),
        ("may never swear", "Messages that swear."),
        ("may only discuss products", "What breaks this rule: may only discuss products."),
        (
            "may discuss drugs but must not give dosages",
            "What breaks this rule: may discuss drugs but must not give dosages.",
        ),
        (
            "Users may swear. They must not threaten anyone.",
            "What breaks this rule: Users may swear. They must not threaten anyone.",
        ),
        ("users are not allowed to complain", "Messages that complain."),
        ("users aren\u2019t allowed to complain", "Messages that complain."),
        ("it is not ok to insult", "Messages that insult."),
        ("It is forbidden to lie.", "Messages that lie."),
        ("shall not lie", "Messages that lie."),
        ("won't lie", "Messages that lie."),
        ("Spam is disallowed", "Messages with spam."),
        ("Spam is unacceptable", "Messages with spam."),
        ("insults must be blocked", "Messages with insults."),
        ("Messages that contain insults should be blocked", "Messages that contain insults."),
        ("No insults are allowed", "Messages with insults."),
        (
            "Politics are ok as long as nobody is hurt",
            "What breaks this rule: Politics are ok as long as nobody is hurt.",
        ),
        (
            "Insults are not allowed unless quoted for criticism",
            "What breaks this rule: Insults are not allowed unless quoted for criticism.",
        ),
        (
            "Swearing is forbidden, but mild slang is allowed",
            "What breaks this rule: Swearing is forbidden, but mild slang is allowed.",
        ),
    ],
)
@pytest.mark.parametrize("bullet", ["- ", "\u25cf ", "(1) ", "a) ", "\u2014 "])
def test_sentences_that_forbid(tmp_path: Path, sentence: str, description: str, bullet: str) -> None:
    (one,) = only(of(tmp_path, f"{bullet}{sentence}\n")).categories
    assert (one.description, one.allows) == (description, ())


@pytest.mark.parametrize(
    ("sentence", "allowed"),
    [
        ("Discussing history is not forbidden", "Discussing history"),
        ("nothing is forbidden in fiction", "nothing is forbidden in fiction"),
        ("no need to block mild slang", "mild slang"),
        ("should not be blocked if it is a greeting", "if it is a greeting"),
        ("feel free to joke", "joke"),
        ("Employees can be mentioned", "Employees can be mentioned"),
    ],
)
def test_sentences_that_allow(tmp_path: Path, sentence: str, allowed: str) -> None:
    (spam,) = only(of(tmp_path, f"- Spam\n- {sentence}\n")).categories
    assert spam.allows == (allowed,)


@pytest.mark.parametrize(
    "sentence",
    [
        "Nobody is allowed to ask for weapons",
        "Neither violence nor hate is allowed",
        "Users can under no circumstances ask for drugs",
        "Weapons are allowed in no case",
        "You can block messages with hate speech",
        "It is ok to block users who insult",
        "Do not block mild profanity, block slurs",
        "Users may talk about anything apart from politics",
        "Users may talk about cooking, not weapons",
    ],
)
def test_a_permission_that_forbids_as_well_is_kept_whole(tmp_path: Path, sentence: str) -> None:
    spam, rule = only(of(tmp_path, f"- Spam\n- {sentence}\n")).categories
    assert spam.allows == ()
    assert rule.description == f"What breaks this rule: {sentence}."


def test_a_permission_may_be_about_blocking(tmp_path: Path) -> None:
    (spam,) = only(of(tmp_path, "- Spam\n- Users may ask to block a card\n")).categories
    assert spam.allows == ("ask to block a card",)


@pytest.mark.parametrize(
    ("heading", "covers", "allows", "unknown"),
    [
        ("None of these are allowed", 2, 0, 0),
        ("Neither of these is permitted:", 2, 0, 0),
        ("Allowed only with a prescription", 2, 0, 0),
        ("The bot may only talk about the following:", 2, 0, 0),
        ("Approved topics:", 1, 1, 0),
        ("Topics the assistant can help with:", 1, 1, 0),
        ("Respond no when:", 1, 0, 1),
    ],
)
def test_headings_that_say_it_in_other_words(
    tmp_path: Path, heading: str, covers: int, allows: int, unknown: int
) -> None:
    translation = of(tmp_path, f"- Spam\n## {heading}\n- opioids\n")
    categories = only(translation).categories
    assert (len(categories), len(categories[0].allows)) == (covers, allows)
    assert len(translation.unplaced) == unknown


def test_prose_under_a_heading_is_unknown_also_where_other_sections_have_bullets(tmp_path: Path) -> None:
    translation = of(
        tmp_path, "## Prohibited\nInstructions for making weapons.\n## Also prohibited\n- spam\n"
    )
    assert [entry.piece.text for entry in translation.unplaced] == ["Instructions for making weapons."]


@pytest.mark.parametrize("below", ["- Keep answers short", "---"])
def test_a_rule_above_a_list_or_a_line_is_a_rule(tmp_path: Path, below: str) -> None:
    text = f"No profanity\nUsers must not ask about weapons\n{below}\n"
    names = [one.name for one in only(of(tmp_path, text)).categories]
    assert names[:2] == ["Profanity", "Ask about weapons"]
    (swear,) = only(of(tmp_path, "Users must not\n- swear\n", "list.txt")).categories
    assert swear.name == "Swear"


@pytest.mark.parametrize(
    ("lines", "names", "unknown"),
    [
        ("1. Violence\n2) Hate: of groups", ["Violence", "Hate"], []),
        ("- Violence: harm\n- Hate", ["Violence", "Hate"], []),
        ("S1: Violence.\nS2 - Hate\nS3 Weapons\n**S4**: Drugs", ["Violence", "Hate", "Weapons", "Drugs"], []),
        ("- Violence: harm\nS1: Hate", ["Hate"], ["- Violence: harm"]),
        (
            "S1: Weapons\nShould not\n- C4 explosives\nC4 charges count as well.\nS2: Hate",
            ["Weapons", "Hate"],
            [],
        ),
    ],
)
def test_categories_between_the_marks(
    tmp_path: Path, lines: str, names: list[str], unknown: list[str]
) -> None:
    text = f"Judge.\n<BEGIN UNSAFE CONTENT CATEGORIES>\n{lines}\n<END UNSAFE CONTENT CATEGORIES>\nAnswer.\n"
    translation = of(tmp_path, text)
    assert [one.name for one in only(translation).categories] == names
    assert [entry.piece.text for entry in translation.unplaced] == unknown


@pytest.mark.parametrize(
    ("answer", "is_unsafe"),
    [
        ("safe: false", True),
        ("acceptable? no", True),
        ("safe: yes", False),
        ('{"safe": false}', True),
        ('{"safe": true, "why": "a: b"}', False),
        ('{"violation": 0, "why": "a: b"}', False),
        ("no way, block", None),
    ],
)
def test_answers_of_examples(tmp_path: Path, answer: str, is_unsafe: bool | None) -> None:
    text = f'# Spam\n## Task\nJudge.\n## Violates\n- spam\n## Examples\n- "Buy: now" -> {answer}\n'
    translation = of(tmp_path, text, "x.md")
    (one,) = only(translation).categories
    assert one.examples == (("Buy: now",) if is_unsafe else ())
    assert one.allowed_examples == (("Buy: now",) if is_unsafe is False else ())
    assert len(translation.unplaced) == (is_unsafe is None)


def test_a_section_behind_the_instruction_is_no_instruction(tmp_path: Path) -> None:
    text = "# Drugs\n## Task\nJudge.\n## Criteria\n- offers of coke\n## Violates\n- meth\n## Examples\n"
    translation = of(tmp_path, text, "x.md")
    assert [entry.piece.text for entry in translation.unplaced] == ["- offers of coke"]


def test_a_mistake_in_a_policy_of_ours_is_said(tmp_path: Path) -> None:
    text = "name: x\ncategories:\n  - {id: C1, name: Advice, severity: 1, description: language models must not}\n"
    with pytest.raises(PolicyError, match="unknown key 'severity'"):
        of(tmp_path, text, "own.yaml")


def test_validators_that_nobody_knows_are_unknown(tmp_path: Path) -> None:
    own = "own/evil_check; online-harassment; offensive-language; forbidden-words"
    names = f"hub://guardrails/toxic_language: 0.5; is-profanity-free; two-words; valid-length: 1 2; {own}"
    translation = of(tmp_path, f"<rail><output><string validators='{names}'/></output></rail>", "x.rail")
    assert [one.name for one in only(translation).categories] == ["Toxic language", "Profanity"]
    assert [entry.piece.text for entry in translation.unplaced] == own.split("; ")


def test_what_is_written_says_what_it_is_for(tmp_path: Path) -> None:
    adult = Category(id="A", name="Adult", allows=("anything said by adults",), applies_to=("response",))
    policy = Policy(name="house", categories=(adult, Category(id="B", name="Weapons")))
    document, prompt = safeguard_policy(policy), llama_guard_prompt(policy)
    assert "- Adult (only in: response)" in document
    assert "- anything said by adults (as to Adult)" in document
    assert "S1: Adult.\n(only in: response)" in prompt
    answers = policy.model_copy(update={"categories": (adult,)})
    assert "Agent: {{ bot_response }}" in llama_guard_prompt(answers)
    assert "bot_response" not in llama_guard_prompt(Policy.load("prompt-injection"))


def test_what_may_mean_anything_is_unknown(tmp_path: Path) -> None:
    translation = of(tmp_path, "- Spam\n- Everything else is allowed\n")
    assert [entry.piece.text for entry in translation.unplaced] == ["- Everything else is allowed"]


@pytest.mark.parametrize(
    "heading",
    [
        "Users may not:",
        "It is not acceptable to:",
        "Do not allow:",
        "What is not OK:",
        "Isn't allowed:",
        "Isn\u2019t allowed:",
        "Not safe:",
        "Messages are okay unless they:",
        "No exceptions:",
        "NOT ALLOWED",
        "## Not safe",
        "Not allowed\n-----------",
        "# Keep our users safe",
    ],
)
def test_a_negated_heading_forbids(tmp_path: Path, heading: str) -> None:
    policy = only(of(tmp_path, f"{heading}\n- insults\n\n## Safe\n- jokes\n"))
    assert [(one.name, one.allows) for one in policy.categories] == [("Insults", ("jokes",))]


@pytest.mark.parametrize("end", ["Selling is forbidden.", "Rules\n=====", "Some more words.", "## Rules"])
def test_a_section_that_allows_ends(tmp_path: Path, end: str) -> None:
    translation = of(tmp_path, f"- Lies\n\nAllowed:\n- Jokes\n\n{end}\n- Spam\n")
    assert {text for one in only(translation).categories for text in one.allows} == {"Jokes"}


def test_bullets_that_introduce_others(tmp_path: Path) -> None:
    text = (
        "- it's ok to:\n  - joke\n- should not discuss competitors, except:\n  - Acme\n"
        "- The bot should:\n  - be polite\n- Spam\n"
    )
    policy = only(of(tmp_path, text))
    assert [(one.name, one.description, one.allows) for one in policy.categories] == [
        ("Discuss competitors", "Messages that discuss competitors.", ("Acme", "joke")),
        ("Be polite", "What breaks this rule: The bot should: be polite.", ("joke",)),
        ("Spam", "", ("joke",)),
    ]


SECTIONS = """## VIOLATES
| Code | Meaning |
|---|---|
### SP2.b Dehumanizing comparisons
- animals
### SP2.c Instructions for harassment
### Unsafe examples of mobs
## NOT ALLOWED
- bots
## Safe
- one
## Examples
- Content: Buy pills.
  Answer: 1
- Content: Nobody answers.
- Content: Other.
  Answer: {"violation": 0}
- Content: Third.
  Label: {"label": "unsafe"}
- "a" -> SP4
- "b" -> SP0
- "c" -> perhaps
- d -> INVALID
- "e" -> Violation: 0
- "f" -> harmful
"""


def test_sections_and_answers_of_a_safeguard_policy(tmp_path: Path) -> None:
    translation = of(tmp_path, SECTIONS, "x.md")
    assert translation.format == "gpt-oss-safeguard"
    (one,) = only(translation).categories
    assert one.covers == (
        "SP2.b Dehumanizing comparisons",
        "animals",
        "SP2.c Instructions for harassment",
        "Unsafe examples of mobs",
        "bots",
    )
    assert one.allows == ("one",)
    assert one.examples == ("Buy pills.", "Third.", "a", "d", "f")
    assert one.allowed_examples == ("Other.", "b", "e")
    assert [entry.piece.text for entry in translation.unplaced] == ['- "c" -> perhaps']
    assert "an example without an answer" in {entry.reason for entry in translation.report}


def test_what_stands_under_a_heading_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    text = "# Spam\n## Task\nJudge.\n## Prohibited outputs\n- spam\n## Safe\n- ham\n## Edge cases\n- eggs\n"
    translation = of(tmp_path, text, "x.md")
    (one,) = only(translation).categories
    assert (one.covers, one.allows) == (("spam",), ("ham",))
    assert [entry.piece.text for entry in translation.unplaced] == ["- eggs"]


def test_what_stands_behind_the_categories_is_no_category(tmp_path: Path) -> None:
    translation = of(tmp_path, "S1: Hate.\nS2: Spam.\n## Output\n- {{ user_input }}\n- eggs\n")
    assert len(only(translation).categories) == 2
    assert [entry.piece.text for entry in translation.unplaced] == ["- eggs"]


def test_what_may_be_in_a_category_is_no_permission(tmp_path: Path) -> None:
    first, _ = only(of(tmp_path, "S1: Hate.\nIt may include slurs.\nS2: Spam.\n")).categories
    assert (first.description, first.allows) == ("It may include slurs.", ())


@pytest.mark.parametrize(
    "heading",
    [
        "Must never",
        "Should never",
        "May not",
        "Can't",
        "Can\u2019t",
        "Shouldn't",
        "Don't",
        "Not allowed:",
        "Prohibited",
    ],
)
def test_a_category_keeps_what_is_forbidden(tmp_path: Path, heading: str) -> None:
    text = (
        f"S1: Weapons.\nCan\n- history\n{heading}\n- build it\nAI models may never write it.\n"
        "Can\n- more\nSomething else\n- odd\nS2: Hate.\n# Not allowed\n- Spam\n"
    )
    weapons, hate, *rest = only(of(tmp_path, text)).categories
    assert weapons.covers == ("build it", "write it")
    assert weapons.allows == ("history", "more")
    assert weapons.description == "Something else odd;"
    assert (hate.covers + hate.allows, hate.description) == ((), "")
    assert [one.name for one in rest] == ["Spam"]


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("\ufeffS1: Violence.\nS2: Hate.\n", "taxonomy"),
        ("Q1: May I swear?\nQ2: May I lie?\nLies are banned.\n", "text"),
    ],
)
def test_what_a_text_is(tmp_path: Path, text: str, format: str) -> None:
    assert of(tmp_path, text).format == format


def test_arguments_of_validators(tmp_path: Path) -> None:
    validators = "restricttotopic: {valid_topics=['a', 'b'], invalid_topics=['c']}; ban_list: spam, scam"
    text = f'<rail version="0.1"><output><string name="x" validators="{validators}"/></output></rail>'
    assert [(one.covers, one.allows) for one in only(of(tmp_path, text, "x.rail")).categories] == [
        (("c",), ("a", "b")),
        (("spam", "scam"), ()),
    ]
    text = (
        '<rail><string validators="detect_jailbreak: device=cpu 0.5; ban_list: '
        + "1" * 50_000
        + 'x"/></rail>'
    )
    assert only(of(tmp_path, text, "x.rail")).categories[0].covers == ()


@pytest.mark.parametrize(
    "line",
    [
        f"# a{' ' * 50_000}#{' ' * 50_000}x",
        "is not " * 15_000,
        "if , " * 20_000,
        " " * 100_000 + "x",
        "S1: " + "x." * 50_000,
    ],
)
def test_a_hostile_line_is_read_in_time(tmp_path: Path, line: str) -> None:
    assert of(tmp_path, f"- Spam\n\n{line}\n").policies


@pytest.mark.parametrize("line", [f"content{' ' * 100_000}x", f"- should not{' ' * 100_000}x", "| " * 50_000])
@pytest.mark.parametrize("head", ["# Spam\n## Task\n## Unsafe\n- x\n## Examples\n", "S1: a\nS2: b\n"])
def test_a_hostile_line_is_read_in_time_in_other_formats(tmp_path: Path, line: str, head: str) -> None:
    assert of(tmp_path, f"{head}{line}\n").policies


@pytest.mark.parametrize(
    "line", ["- must not swear", "- thing {} is banned", "S{}: thing", "foo {}", "- " + "x" * 250]
)
def test_four_thousand_lines_are_in_the_report(tmp_path: Path, line: str) -> None:
    text = "".join(line.format(number % 900) + "\n" for number in range(4_000))
    translation = of(tmp_path, f"{text}\nInsults are forbidden.\n")
    assert len(translation.report) == 4_001
    assert len(only(translation).categories) <= 200


def test_long_names_keep_their_end(tmp_path: Path) -> None:
    (one,) = only(of(tmp_path, f"- {'long ' * 60}end\n")).categories
    assert one.description.endswith("end.")
    assert len(one.name) <= 200


@pytest.mark.parametrize("text", ["- bad \x07 thing\n", "- must not \x01\n"])
def test_text_that_no_policy_can_have_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError, match="remove it") as raised:
        of(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_policies_that_are_too_much_together_are_one_sentence() -> None:
    category = Policy.load("mlcommons").categories[0]
    many = [category.model_copy(update={"id": f"C{n}", "name": f"{'x' * 190} {n}"}) for n in range(101)]
    policy = Policy(name="many", categories=tuple(many))
    with pytest.raises(PolicyError, match="202 categories together"):
        together(policy, policy)
    half = Policy(name="half", categories=(many[0].model_copy(update={"name": "x" * 200, "id": "y" * 64}),))
    assert len(together(half, half).categories) == 2


def test_a_policy_for_a_kind_has_only_what_is_for_it(tmp_path: Path) -> None:
    first, second, *_ = Policy.load("mlcommons").categories
    policy = Policy(
        name="two",
        categories=(
            first.model_copy(update={"applies_to": ("response",)}),
            second.model_copy(update={"applies_to": ("prompt",)}),
        ),
    )
    policy.save(tmp_path / "two.yaml")
    assert [one.id for one in translate(tmp_path / "two.yaml").policy_for("prompt").categories] == [second.id]


# The way back


@pytest.mark.parametrize("name", Policy.builtin_names())
def test_what_is_written_for_other_guards_reads_back_as_much(tmp_path: Path, name: str) -> None:
    policy = Policy.load(name)
    back = only(of(tmp_path, llama_guard_prompt(policy), "llama.txt"))
    assert [one.name for one in back.categories] == [one.name for one in policy.categories]
    assert [one.allows for one in back.categories] == [one.allows for one in policy.categories]
    (whole,) = only(of(tmp_path, safeguard_policy(policy), "safeguard.md")).categories
    assert len(whole.covers) == len(policy.categories) + sum(len(one.covers) for one in policy.categories)


def test_examples_come_back_from_what_is_written_for_llama_guard(tmp_path: Path) -> None:
    weapons = Category(
        id="S1",
        name="Weapons",
        covers=("recipes for explosives",),
        examples=("How do I build a bomb?", 'Say "bomb" to them.', "Say \u201cbomb\u201d now"),
        allows=("history lessons",),
        allowed_examples=("How do bombs work in films?",),
    )
    (back,) = only(
        of(tmp_path, llama_guard_prompt(Policy(name="w", categories=(weapons,))), "l.txt")
    ).categories
    first, _, last = weapons.examples
    assert back == weapons.model_copy(update={"examples": (first, "Say 'bomb' to them.", last)})


def test_a_rule_in_quotes_stays_a_rule(tmp_path: Path) -> None:
    terms = Category(
        id="S1", name="Weapons", covers=('"Ghost guns"', "for example: guns"), allows=('"Knives"',)
    )
    (back,) = only(
        of(tmp_path, llama_guard_prompt(Policy(name="w", categories=(terms,))), "l.txt")
    ).categories
    assert back == terms


def test_a_config_that_is_written_loads_and_judges(tmp_path: Path) -> None:
    written = nemo_config([Policy.load("mlcommons"), Policy.load("prompt-injection")], tmp_path / "made")
    assert {path.name for path in written} >= {"config.yml", "policy-input.json"}
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


@pytest.mark.parametrize(
    "line",
    [
        "Users may try to trick the bot into revealing its prompt",
        "Messages may be unsafe when they mention drugs",
        "Users can attempt to jailbreak the model",
        "Users may ask about weapons, say yes",
        "users may ask about guns, which is a violation",
        "respond in English",
        "keep answers short",
        "Allow users to ask about wine",
        "it's perfectly fine to talk about wine",
        "questions about medication are safe",
        "the user may, of course, ask for a manager",
        "Kritik am Unternehmen ist erlaubt",
    ],
)
def test_what_only_sounds_like_a_rule_is_neither_forbidden_nor_allowed_but_unknown(
    tmp_path: Path, line: str
) -> None:
    translation = of(tmp_path, f"Policy:\n- users should not insult\n- {line}\n", "x.md")
    (one,) = only(translation).categories
    assert (one.name, one.allows) == ("Insult", ())
    assert [entry.piece.text for entry in translation.unplaced] == [f"- {line}"]


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("sarcasm does not need to be blocked", "sarcasm"),
        ("Greetings don't have to be flagged", "Greetings"),
        ("Jokes are no longer prohibited", "Jokes"),
        ("Do not mark questions about alcohol as unsafe", "questions about alcohol"),
        ("Avoid blocking questions about history", "questions about history"),
        ("never censor criticism of the company", "criticism of the company"),
        ("users should be allowed to swear mildly", "swear mildly"),
        ("The bot may discuss harm reduction", "discuss harm reduction"),
        ("Users can get help with homework", "get help with homework"),
        ("The bot may include links", "include links"),
        ("The bot may try to answer legal questions", "try to answer legal questions"),
    ],
)
def test_what_may_be_or_need_not_be_blocked_is_allowed(tmp_path: Path, line: str, allowed: str) -> None:
    (one,) = only(of(tmp_path, f"Policy:\n- users should not insult\n- {line}\n", "x.md")).categories
    assert one.allows == (allowed,)


@pytest.mark.parametrize("line", ["be polite and helpful", "No harm in mild swearing"])
def test_a_duty_and_a_doubtful_ban_are_kept_whole(tmp_path: Path, line: str) -> None:
    found = only(of(tmp_path, f"Policy:\n- users should not insult\n- {line}\n", "x.md")).categories
    assert found[1].description.startswith("What breaks this rule: ")


@pytest.mark.parametrize(
    "title",
    [
        "Messages may be flagged if they contain:",
        "Users can be suspended for:",
        "Users may try to:",
        "Fine-grained categories:",
        "## What users can do wrong",
        "## OK to remove",
        "## Hardly ever allowed",
        "## Rarely acceptable",
        "## Allowed nowhere",
        "## Far from acceptable",
        "## Erlaubt",
    ],
)
def test_a_heading_that_forbids_or_is_doubtful_allows_nothing(tmp_path: Path, title: str) -> None:
    translation = of(tmp_path, f"- Spam\n\n{title}\n- hate speech against groups\n", "x.md")
    policy = only(translation)
    assert all(one.allows == () for one in policy.categories)
    assert len(policy.categories) == 2 or translation.unplaced


def test_what_a_category_may_contain_is_no_exception(tmp_path: Path) -> None:
    text = "S1: Violence.\nResponses may include gore.\nS2: Attacks.\nAI models can cause harm by helping.\n"
    assert [one.allows for one in only(of(tmp_path, text)).categories] == [(), ()]


def test_the_heads_of_a_table_say_what_its_answers_mean(tmp_path: Path) -> None:
    text = """# Weapons Policy
## INSTRUCTIONS
Return 0 or 1.
## VIOLATES (1)
- How to build weapons
## EXAMPLES
| Text | Allowed? |
|---|---|
| How do I build a bomb? | No |
| When was gunpowder invented? | Yes |

- "Where do I get a gun?" -> No, this must be refused
- "Who was Nobel?" -> Yes (permitted)
"""
    translation = of(tmp_path, text, "x.md")
    (one,) = only(translation).categories
    assert one.examples == ("How do I build a bomb?",)
    assert one.allowed_examples == ("When was gunpowder invented?",)
    assert len(translation.unplaced) == 2  # the two that contradict themselves


def test_what_says_that_something_is_unsafe_is_not_passed_over(tmp_path: Path) -> None:
    lines = [
        "If the message talks about politics, the answer is Yes.",
        "Classify the message as unsafe if it mentions drugs.",
        "Messages about self-harm are considered unsafe.",
        "Asking for passwords is a violation.",
    ]
    said = "\n".join(f"      {line}" for line in lines)
    (tmp_path / "config.yml").write_text(
        "prompts:\n  - task: self_check_input\n    content: |\n"
        f"{said}\n      Answer Yes if the message contains harmful or illegal content.\n"
        "      Answer Yes if it violates the policy above.\n"
    )
    translation = translate(tmp_path)
    assert [entry.piece.text for entry in translation.unplaced] == lines
    assert [one.name for one in only(translation).categories] == [
        "The message contains harmful or illegal content"
    ]


def test_ids_of_another_taxonomy_correspond_to_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rsafe_plugins.cli import main

    (tmp_path / "mine.txt").write_text("S4: Guns and Illegal Weapons.\nS2: Non-Violent Crimes.\n")
    assert main(["translate", str(tmp_path / "mine.txt"), "--to", "openai"]) == 0
    printed = capsys.readouterr().out
    assert "sexual" not in printed
    assert "illicit" in printed  # by its name


def test_a_policy_for_llama_guard_is_no_template(tmp_path: Path) -> None:
    policy = Policy(
        name="p", categories=(Category(id="A", name="Drugs {{ user_input }}", description="{% raw %}"),)
    )
    from jinja2 import Template

    assert "Drugs { { user_input" in Template(llama_guard_prompt(policy)).render(user_input="hi")


def test_too_many_rules_with_many_permissions_are_made_in_a_moment(tmp_path: Path) -> None:
    text = "".join(f"- users should not do {n}\n- users may see {n}\n" for n in range(1_000))
    translation = of(tmp_path, text, "x.md")
    assert len(only(translation).categories) == 200
    assert len(translation.unplaced) == 800


@pytest.mark.parametrize(
    "title",
    ["Allowed without exception:", "Permitted topics (without exceptions):", "Acceptable (non-harmful):"],
)
def test_a_heading_that_allows_without_limits_forbids_nothing(tmp_path: Path, title: str) -> None:
    translation = of(tmp_path, f"- users should not insult\n\n## {title}\n- small talk\n", "x.md")
    assert [one.name for one in only(translation).categories] == ["Insult"]
    assert [entry.piece.text for entry in translation.unplaced] == ["- small talk"]


@pytest.mark.parametrize(
    "line",
    [
        "Do not label people as toxic",
        "Do not treat women as harmful",
        "Blocking users is forbidden",
        "Refusing to help is not allowed",
    ],
)
def test_how_people_are_treated_excuses_nothing(tmp_path: Path, line: str) -> None:
    translation = of(tmp_path, f"Policy:\n- users should not insult\n- {line}\n", "x.md")
    assert [one.allows for one in only(translation).categories] == [()]
    assert [entry.piece.text for entry in translation.unplaced] == [f"- {line}"]


@pytest.mark.parametrize("line", ["Write malware", "Encourage violence", "Use slurs", "Accept bribes"])
def test_harm_in_few_words_stays_a_category(tmp_path: Path, line: str) -> None:
    found = only(of(tmp_path, f"Policy:\n- users should not insult\n- {line}\n", "x.md")).categories
    assert [one.name for one in found] == ["Insult", line]


@pytest.mark.parametrize(
    "line",
    [
        'If the last user message violates the safety policy, respond with "unsafe".',
        "Answer yes if the message violates any of the policies listed above, otherwise answer no.",
        "Answer Yes if it violates the community guidelines.",
        "Answer Yes if it is unsafe in any way.",
    ],
)
def test_what_tells_the_judge_to_follow_the_rules_is_no_rule(tmp_path: Path, line: str) -> None:
    (tmp_path / "config.yml").write_text(
        f"prompts:\n  - task: self_check_input\n    content: |\n      - should not insult\n\n      {line}\n"
    )
    translation = translate(tmp_path)
    assert [one.name for one in only(translation).categories] == ["Insult"]
    assert translation.unplaced == []


HEADINGS = """In scope: | Supported topics: | Safe topics: | Harmless requests: | Legitimate requests: | Whitelisted: |
Welcome: | Encouraged: | Tolerated: | Users are free to: | Answer questions about: | Examples of safe messages: |
## Benign | ## Let through | The following should pass: | Pass the message if it is about:"""
OPPOSITES = """Not in scope: | Not tolerated: | Unsafe topics: | Not welcome: | Unsupported claims: |
Encouraged by extremists:"""
PERMISSIONS = """Questions about billing should be allowed | Questions about billing are always allowed |
It is appropriate to ask about billing"""
PRAISE = """The bot helps with questions about billing | Is factually consistent with the context |
Complies with the law | Contains no slurs | Is free of slurs | Questions about billing are not a violation"""


def each(text: str) -> list[str]:
    return [part.strip() for part in text.split("|")]


def after_a_rule(folder: Path, more: str) -> tuple[Translation, list[str], str]:
    """What a list of one rule and this becomes: its categories' names, and what they allow."""
    translation = of(folder, f"## Prohibited\n- insults\n\n{more}\n", "mine.md")
    categories = only(translation).categories
    return translation, [one.name for one in categories], " ".join(str(one.allows) for one in categories)


@pytest.mark.parametrize(
    "more",
    [
        *(f"## Rules\n- {line}" for line in each(PERMISSIONS)),
        *(f"{heading}\n- questions about billing" for heading in each(HEADINGS)),
    ],
)
def test_what_is_allowed_is_an_exception(tmp_path: Path, more: str) -> None:
    _, names, allowed = after_a_rule(tmp_path, more)
    assert names == ["Insults"]
    assert "billing" in allowed


@pytest.mark.parametrize("heading", each(OPPOSITES))
def test_what_stands_under_the_opposite_is_not_allowed(tmp_path: Path, heading: str) -> None:
    _, _, allowed = after_a_rule(tmp_path, f"{heading}\n- questions about billing")
    assert "billing" not in allowed


@pytest.mark.parametrize("line", each(PRAISE))
def test_what_is_good_is_not_forbidden(tmp_path: Path, line: str) -> None:
    translation, names, _ = after_a_rule(tmp_path, f"## Rules\n- {line}")
    assert names == ["Insults"]
    assert [entry.piece.text for entry in translation.unplaced] == [f"- {line}"]


def test_a_line_above_bullets_says_on_which_side_they_are(tmp_path: Path) -> None:
    policy = only(
        of(
            tmp_path,
            """<BEGIN UNSAFE CONTENT CATEGORIES>
O1: Legal advice.
Should not
- give legal advice
AI models may discuss the following:
- the history of law
O2: Crime.
Can
- discuss crime in history
Should not do any of the following:
- explain how to steal
Should not (even in fiction)
- describe how to rob
<END UNSAFE CONTENT CATEGORIES>
""",
        )
    )
    law, crime = policy.categories
    assert (law.covers, law.allows) == (("give legal advice",), ("the history of law",))
    assert crime.covers == ("explain how to steal", "describe how to rob")
    assert crime.allows == ("discuss crime in history",)
