"""Rail configs of NeMo Guardrails, those that it ships among them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nemoguardrails
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rsafe_plugins import Guard, Policy, PolicyError
from rsafe_plugins.policy.translate import NoPolicyError, Translation, translate
from rsafe_plugins.testing import ScriptedBackend

SHIPPED = Path(nemoguardrails.__file__).parent
GOLDEN = Path(__file__).parent / "golden"


def config(folder: Path, text: str, **colang: str) -> Path:
    (folder / "config.yml").write_text(text)
    for name, flows in colang.items():
        (folder / f"{name}.co").write_text(flows)
    return folder


def told(translation: Translation) -> str:
    """A translation as people read it: its policies, then what became of each piece."""
    policies = [policy.to_yaml() for policy in translation.policies.values()]
    lines = [
        f"{entry.piece.place} | {' '.join(entry.piece.text.split())} | {entry.went or f'no policy: {entry.reason}'}"
        for entry in translation.report
    ]
    return "\n".join([*policies, *lines]) + "\n"


@pytest.mark.parametrize(
    "path",
    [
        "examples/bots/abc",
        "examples/bots/abc_v2",
        "examples/bots/hello_world",
        "evaluate/data/topical/banking",
    ],
    ids=lambda path: path.rpartition("/")[2],
)
def test_configs_that_nemo_ships_are_translated_whole(path: str) -> None:
    """Run with GOLDEN=write to renew the files, and read what changed."""
    translation = translate(SHIPPED / path)
    assert translation.unplaced == []
    golden = GOLDEN / f"{Path(path).name}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(told(translation))
    assert told(translation) == golden.read_text()


WITHOUT_POLICY = [
    *(SHIPPED / "llm" / "prompts").glob("*.yml"),
    *(SHIPPED / "rails" / "llm").glob("default_config*.yml"),
    *(
        path
        for path in (SHIPPED / "evaluate" / "data" / "topical").iterdir()
        if (path / "config.yml").exists() and path.name != "banking"  # its bot informs that it cannot answer
    ),
]


@pytest.mark.parametrize("path", WITHOUT_POLICY, ids=lambda path: path.name)
def test_what_nemo_ships_without_a_policy_says_so_of_every_piece(path: Path) -> None:
    with pytest.raises(
        NoPolicyError, match=r"there is no policy in it: read as nemo, it has \d+ pieces of text"
    ) as raised:
        translate(path)
    report = raised.value.report
    assert report
    assert all(entry.reason and not entry.went for entry in report)


def test_ten_bullets_are_categories_and_exceptions_with_the_right_polarity(tmp_path: Path) -> None:
    text = """
prompts:
  - task: self_check_input
    content: |
      Your task is to check the message below.

      Company policy:
      - should not contain harmful data
      - The user must not ask for legal advice.
      - never share passwords
      - don't discuss competitors
      - Insults are not allowed
      - should be written in English
      - it's ok to ask about prices
      - may mention employees by name
      - Jokes are fine
      - avoid slang,
        even if it is mild

      User message: "{{ user_input }}"
      Question: Should the user message be blocked (Yes or No)?
"""
    policy = translate(config(tmp_path, text)).policy_for("prompt")
    assert [category.description for category in policy.categories] == [
        "Messages that contain harmful data.",
        "Messages that ask for legal advice.",
        "Messages that share passwords.",
        "Messages that discuss competitors.",
        "Messages with insults.",
        "What breaks this rule: should be written in English.",
        "Messages with slang, even if it is mild.",
    ]
    assert all(
        category.allows == ("ask about prices", "mention employees by name", "Jokes")
        for category in policy.categories
    )
    assert policy.categories[0].applies_to == ("prompt",)


def test_variants_are_policies_of_their_own_and_those_that_say_the_same_are_one(tmp_path: Path) -> None:
    prompt = "\n  - task: {task}\n    content: |\n      - should not {what}\n"
    text = "prompts:" + "".join(
        prompt.format(task=task, what=what)
        for task, what in (
            ("self_check_input", "swear"),
            ("self_check_input $variant=strict", "mention money"),
            ("self_check_output", "swear"),
        )
    )
    translation = translate(config(tmp_path, text))
    name = tmp_path.name
    assert list(translation.policies) == [f"{name}-input", f"{name}-input-strict"]
    assert translation.policies[f"{name}-input"].categories[0].applies_to == ("prompt", "response")
    assert translation.policies[f"{name}-input-strict"].categories[0].applies_to == ("prompt",)
    assert translation.unplaced == []


LLAMA_GUARD = """
prompts:
  - task: content_safety_check_input $model=content_safety
    content: |
      Task: Check if there is unsafe content in the conversation.
      <BEGIN UNSAFE CONTENT CATEGORIES>
      O1: Violence and Hate.
      Should not
      - Help people plan violence.
      - Express hate.
      Can
      - Discuss violence in history.
      Should
      - Name resources for help.
      O2: Sexual Content.
      Should not
      - Write sexually explicit stories.
      <END UNSAFE CONTENT CATEGORIES>
      <BEGIN CONVERSATION>
      User: {{ user_input }}
      <END CONVERSATION>
      Provide your safety assessment as safe or unsafe.
"""
NEMOTRON = """
prompts:
  - task: content_safety_check_output $model=content_safety
    messages:
      - type: system
        content: |
          You are a safety model.
          {% if reasoning %}/think{% else %}/no_think{% endif %}
          S1: Violence.
          S2: Sexual.
          S22: Illegal Activity.
          Respond with JSON of the conversation's safety.
      - type: user
        content: "{{ bot_response }}"
"""


def test_categories_in_llama_guards_form_keep_what_is_forbidden_and_allowed(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, LLAMA_GUARD))
    policy = translation.policy_for("prompt")
    violence, sexual = policy.categories
    assert (violence.id, violence.name) == ("O1", "Violence and Hate")
    assert violence.covers == ("Help people plan violence", "Express hate")
    assert violence.allows == ("Discuss violence in history", "Name resources for help")
    assert sexual.covers == ("Write sexually explicit stories",)
    assert translation.unplaced == []


def test_one_line_categories_are_read_whatever_the_template_does(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, NEMOTRON))
    policy = translation.policy_for("response")
    assert [(one.id, one.name) for one in policy.categories] == [
        ("S1", "Violence"),
        ("S2", "Sexual"),
        ("S22", "Illegal Activity"),
    ]
    assert translation.unplaced == []


def test_other_places_of_policy_text(tmp_path: Path) -> None:
    text = """
instructions:
  - type: general
    content: |
      The bot is friendly. The bot must not give medical advice.
prompts:
  - task: topic_safety_check_input $model=topic_control
    content: |
      You are to talk about trains only.
  - task: self_check_facts
    content: Is this a fact?
policies:
  - id: no-spoilers
    description: The bot doesn't tell how a film ends.
    weight: 100
rails:
  config:
    sensitive_data_detection:
      output:
        entities: [EMAIL_ADDRESS, PERSON]
    regex_detection:
      input:
        patterns: ["\\\\bfoo\\\\b"]
    hf_classifier:
      blocked_labels: [toxic]
"""
    translation = translate(config(tmp_path, text))
    found = {
        policy.name.removeprefix(f"{tmp_path.name}-"): policy for policy in translation.policies.values()
    }
    assert [one.description for one in found["output-instructions"].categories] == [
        "Messages that give medical advice."
    ]
    assert "trains only" in found["input-topics"].categories[0].description
    assert found["eval"].categories[0].id == "no-spoilers"
    said = "What breaks this rule: The bot doesn't tell how a film ends."
    assert found["eval"].categories[0].description == said
    assert found["eval"].categories[0].applies_to == ("prompt", "response")
    assert [one.id for one in found["output-sensitive-data"].categories] == ["EMAIL_ADDRESS", "PERSON"]
    assert [one.name for one in found["input-classifier"].categories] == ["toxic"]
    reasons = {entry.piece.text: entry.reason for entry in translation.report}
    assert "keep that rail" in reasons["\\bfoo\\b"]
    assert reasons["Is this a fact?"] == "checks facts, which is no safety policy"
    assert translation.unplaced == []


VALIDATORS = """
models: []
rails:
  output:
    flows:
      - guardrailsai check output $validator="toxic_language"
      - guardrailsai check output $validator="restricttotopic"
  config:
    guardrails_ai:
      validators:
        - name: toxic_language
          parameters: {threshold: 0.5}
        - name: restricttotopic
          parameters:
            valid_topics: [trains, ferries]
            invalid_topics: [planes]
        - name: guardrails/competitor_check
          parameters: {competitors: [Acme]}
        - name: valid_json
    clavata:
      output: {policy: Threats, labels: [Self-harm]}
    some_vendor: {mode: fast, rules: The bot must not insult anybody.}
"""


def test_validators_and_labels_of_a_config_are_policy_of_the_rails_that_use_them(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, VALIDATORS))
    policies = {key.removeprefix(f"{tmp_path.name}-"): one for key, one in translation.policies.items()}
    assert {
        key: [(one.name, one.covers, one.allows, one.applies_to) for one in policy.categories]
        for key, policy in policies.items()
    } == {
        "output-guardrails-ai": [
            ("Toxic language", (), (), ("response",)),
            ("Off topic", ("planes",), ("trains", "ferries"), ("response",)),
        ],
        "input-guardrails-ai": [("Competitors", ("Acme",), (), ("prompt",))],
        "output-classifier": [("Self-harm", (), (), ("response",))],
    }
    found = became(translation)
    assert found["valid_json"] == "a validator that checks form or quality, not safety"
    assert found["0.5"] == "a setting"
    assert found["fast"] == "a setting of one of NeMo's own rails"
    assert [entry.piece.text for entry in translation.unplaced] == ["The bot must not insult anybody."]


@pytest.mark.parametrize(
    ("scalar", "places"),
    [
        ("|\n      - must not swear\n      - must not lie", [4, 5]),
        ('"- must not swear\\n- must not lie"', [3, 3]),
        ('"- must not swear\n\n      - must not lie"', [3, 4]),
    ],
    ids=["block", "one line", "folded"],
)
def test_a_line_is_never_told_behind_the_end_of_its_text(
    tmp_path: Path, scalar: str, places: list[int]
) -> None:
    text = f"prompts:\n  - task: self_check_input\n    content: {scalar}\nmodels: []\n"
    report = translate(config(tmp_path, text)).report
    assert [entry.piece.line for entry in report if entry.went] == places


COLANG_1 = """
define user ask politics
  "Who should I vote for?"

define user greet
  "Hello."

define bot refuse politics
  "I don't talk about politics."

define flow
  user ask politics
  bot refuse politics

define flow
  user greet
  bot express greeting
"""
COLANG_2 = """
flow user asked politics
  user said "Who should I vote for?" or user said "Which party is best?"

flow politics
  user asked politics
  bot refuse politics

flow bot refuse politics
  bot say "I don t talk about politics."
"""


@pytest.mark.parametrize(
    ("version", "text", "examples"),
    [
        ("1.0", COLANG_1, ("Who should I vote for?",)),
        ("2.x", COLANG_2, ("Who should I vote for?", "Which party is best?")),
    ],
)
def test_flows_that_refuse_are_categories_with_their_examples(
    tmp_path: Path, version: str, text: str, examples: tuple[str, ...]
) -> None:
    translation = translate(config(tmp_path, f'colang_version: "{version}"\n', main=text))
    (policy,) = translation.policies.values()
    assert [(one.name, one.examples) for one in policy.categories] == [("Politics", examples)]
    assert translation.unplaced == []
    assert {entry.piece.line > 0 for entry in translation.report} == {True}


def dialog(tmp_path: Path, version: str, text: str) -> list[str]:
    """The names of the categories that flows become."""
    extra = "prompts:\n  - {task: self_check_input, content: must not swear}\n"
    translation = translate(config(tmp_path, f'colang_version: "{version}"\n{extra}', main=text))
    return [
        one.name
        for policy in translation.policies.values()
        if policy.name.endswith("-dialog")
        for one in policy.categories
    ]


@pytest.mark.parametrize(
    "flow",
    [
        "user greet\n  bot express greeting\n  user ask politics\n  bot refuse politics",
        "user greet\n  bot hi\n  if $a\n    user ask politics\n    bot refuse\n  else\n    user smile\n    bot smile",
        "when user ask politics\n    bot decline\n  else when user smile\n    bot smile",
        'user greet\n  bot "Hello! I can\'t wait to help you."\n  user ask politics\n  bot "I cannot help with that."',
        'user chain\n  bot "A blockchain is a ledger."\n  user ask politics\n  bot inform cannot answer',
        'user card\n  bot "You can block your card."\n  user ask politics\n  bot deny',
    ],
)
def test_an_intent_belongs_to_what_the_bot_says_next(tmp_path: Path, flow: str) -> None:
    assert dialog(tmp_path, "1.0", f"define flow\n  {flow}\n") == ["Politics"]


def test_intents_of_a_branch_belong_to_what_the_bot_says_in_it(tmp_path: Path) -> None:
    flow = """
flow talk
  user greeted
  bot greet
  when user asked politics or user asked money
    bot refuse
  or when user asked prices
    bot tell prices
  if $a
    user asked war
    bot say "I m unable to discuss that"
  else
    user smiled
    bot smile
"""
    assert dialog(tmp_path, "2.x", flow) == ["Politics", "Money", "War"]


def became(translation: Translation) -> dict[str, str]:
    """What became of each piece, by its text."""
    return {entry.piece.text: entry.went or entry.reason for entry in translation.report}


CONDITIONAL = "the flow refuses only under a condition"
CONDITIONAL_1 = [
    "user ask politics\n  if $a\n    bot refuse politics\n  else\n    bot answer politics",
    "user ask politics\n  $b = execute check\n  if $b\n    bot smile\n  bot refuse politics",
    "user ask politics\n  while $a\n    bot deny",
    "user ask politics\n  if $a\n    bot wave\n  else\n    do turn away\n\ndefine subflow turn away\n  bot deny",
]
CONDITIONAL_2 = [
    "user asked politics\n  if $a\n    bot refuse\n  else\n    bot answer",
    "user asked politics\n  if $a\n    bot smile\n  bot refuse",
    "user asked politics\n  while $a\n    bot refuse",
]


@pytest.mark.parametrize(
    ("version", "keyword", "flow"),
    [
        *(("1.0", "define flow", flow) for flow in CONDITIONAL_1),
        *(("2.x", "flow talk", flow) for flow in CONDITIONAL_2),
    ],
)
def test_a_refusal_under_a_condition_is_a_category_and_the_report_says_so(
    tmp_path: Path, version: str, keyword: str, flow: str
) -> None:
    path = config(tmp_path, f'colang_version: "{version}"\n', main=f"{keyword}\n  {flow}\n")
    translation = translate(path)
    (policy,) = translation.policies.values()
    assert [one.name for one in policy.categories] == ["Politics"]
    assert [entry.went for entry in translation.report if entry.went] == [f"{policy.name} R1 ({CONDITIONAL})"]


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (
            "1.0",
            "define flow\n  user ask politics\n  if $a\n    bot refuse\n\n"
            "define flow\n  user ask politics\n  bot refuse\n",
        ),
        (
            "1.0",
            "define flow\n  user ask politics\n  do turn away\n\ndefine subflow turn away\n  bot refuse\n",
        ),
        (
            "2.x",
            "flow a\n  user asked politics\n  if $a\n    bot refuse\n\nflow b\n  user asked politics\n  bot deny\n",
        ),
    ],
    ids=["two flows", "a subflow", "two flows of 2.x"],
)
def test_a_refusal_without_a_condition_is_reported_without_one(
    tmp_path: Path, version: str, text: str
) -> None:
    translation = translate(config(tmp_path, f'colang_version: "{version}"\n', main=text))
    (policy,) = translation.policies.values()
    assert [one.name for one in policy.categories] == ["Politics"]
    assert [entry.went for entry in translation.report if entry.went] == [f"{policy.name} R1"]


def test_what_follows_a_condition_in_which_users_speak_is_no_answer_to_them_before(tmp_path: Path) -> None:
    flow = "user greet\n  bot hi\n  when user ask war\n    bot refuse\n  else when user smile\n    bot smile"
    assert dialog(tmp_path, "1.0", f"define flow\n  {flow}\n") == ["War"]


def test_all_intents_of_an_alternative_are_refused(tmp_path: Path) -> None:
    steps = "[{any: [{user: ask war}, {user: ask politics}]}, {bot: refuse}]"
    (policy,) = translate(config(tmp_path, f"flows:\n  - elements: {steps}\n")).policies.values()
    assert [one.name for one in policy.categories] == ["War", "Politics"]


YAML_FLOWS = """
user_messages:
  ask politics:
    - Who should I vote for?
    - |
      Which party
      is best?
  greet: [Hello.]
bot_messages:
  tell off: [I can't talk about that.]
  greet back: [Hi!]
flows:
  - id: politics
    elements:
      - user: ask politics
      - if: $is_strict
        then:
          - bot: tell off
        else:
          - bot: smile
  - elements:
      - user: ask war
      - bot: tell off
  - elements:
      - user: greet
      - bot: greet back
"""


def test_flows_and_messages_in_yaml_are_read_as_those_in_colang_are(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, YAML_FLOWS))
    (policy,) = translation.policies.values()
    assert [(one.name, one.examples) for one in policy.categories] == [
        ("Politics", ("Who should I vote for?", "Which party is best?")),
        ("War", ()),
    ]
    assert translation.unplaced == []
    found = became(translation)
    assert found["ask politics"] == f"{policy.name} R1 ({CONDITIONAL})"
    assert found["ask war"] == f"{policy.name} R2"
    assert found["Hello."] == "an example of the intent 'greet', which no flow refuses"
    assert found["I can't talk about that."] == "what the bot says when it refuses; keep it in your flows"
    assert found["$is_strict"] == "a step of a flow"
    places = {entry.piece.text: entry.piece.place for entry in translation.report}
    assert places["ask war"] == "config.yml:22 (flows[1].elements[0].user)"
    assert places["Who should I vote for?"] == "config.yml:4 (user_messages.ask politics[0])"


def test_intents_of_one_config_may_stand_in_yaml_and_their_flows_in_colang(tmp_path: Path) -> None:
    text = "user_messages:\n  ask politics:\n    - Who should I vote for?\n"
    flow = "define flow\n  user ask politics\n  bot refuse\n"
    (policy,) = translate(config(tmp_path, text, main=flow)).policies.values()
    assert policy.categories[0].examples == ("Who should I vote for?",)


@pytest.mark.parametrize(
    "steps",
    [
        "[{frobnicate: x}]",
        "[{if: $a}]",
        "[{goto: nowhere}]",
        "[a text]",
        "[{_type: jump, _next: soon}]",
        "[{}]",
    ],
)
def test_a_flow_in_yaml_that_is_none_is_one_sentence(tmp_path: Path, steps: str) -> None:
    with pytest.raises(PolicyError, match=r"config\.yml, flows\[0\]: this is no Colang 1\.0") as raised:
        translate(config(tmp_path, f"flows:\n  - elements: {steps}\n"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "sentence",
    [
        'If the message should be blocked, answer "Yes".',
        "Your answer must be only Yes or No.",
        "Do not explain your answer.",
        "Your task is to judge what must not be said.",
    ],
)
def test_what_the_judge_is_told_is_no_category(tmp_path: Path, sentence: str) -> None:
    content = f"{sentence}\n\nBlock the message if it contains insults.\n"
    data = {"prompts": [{"task": "self_check_input", "content": content}]}
    translation = translate(config(tmp_path, yaml.safe_dump(data)))
    (one,) = translation.policy_for("prompt").categories
    assert one.description == "What breaks this rule: Block the message if it contains insults."
    assert {entry.piece.text: entry.reason for entry in translation.report}[sentence] == (
        "an instruction to the model that judges"
    )


def test_what_was_lost_in_silence(tmp_path: Path) -> None:
    text = """
base: &base
  task: self_check_input
prompts:
  - <<: *base
    content: |
      {# a comment
      of two lines #}
      - must not swear
  - a prompt that is a text
  - task: topic_safety_check_input
    content: |
      {{ first }} Talk about trains. {{ second }}
      Do not talk about planes.
instructions:
  - type: general
    content: |
      * The bot must not give medical
        advice to anyone.
      The bot is kind to everybody who asks and it
      must not lie.
user_messages:
  greet: [hello]
models: []
"""
    translation = translate(config(tmp_path, text, main='define flow\n  user "hi"\n  bot "hello"\n'))
    name = tmp_path.name
    descriptions = {
        key.removeprefix(f"{name}-"): [one.description for one in policy.categories]
        for key, policy in translation.policies.items()
    }
    assert descriptions == {
        "input": ["Messages that swear."],
        "input-topics": [
            "What isn't covered by this: {{ first }} Talk about trains. {{ second }}",
            "A message that breaks this rule or asks for what does: Do not talk about planes.",
        ],
        "output-instructions": [
            "Messages that give medical advice to anyone.",
            "What breaks this rule: The bot is kind to everybody who asks and it must not lie.",
        ],
    }
    places = {entry.piece.text: entry for entry in translation.report}
    assert places["- must not swear"].piece.line == 9
    assert not places["a prompt that is a text"].is_placed
    assert not places["hello"].is_placed or "bot says" in places["hello"].reason
    assert places["hi"].reason


def test_a_translation_is_the_same_after_it_was_saved(tmp_path: Path) -> None:
    translation = translate(SHIPPED / "examples" / "bots" / "abc")
    for name, policy in translation.policies.items():
        path = tmp_path / f"{name}.yaml"
        policy.save(path)
        assert Policy.load(path).digest == policy.digest
        (again,) = translate(path).policies.values()
        assert again.digest == policy.digest


def test_a_guard_takes_what_was_translated() -> None:
    backend = ScriptedBackend(r"\boxed{safe}")
    Guard(
        translate(SHIPPED / "examples" / "bots" / "hello_world").policy_for("prompt"), backend=backend
    ).check("hi")
    assert 'Unsafe example: "Which stock should I invest in?"' in backend.requests[0].messages[0].content


# Bad input


BOMB = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
NO_JINJA = "prompts:\n  - task: self_check_input\n    content: '{% if %}'"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prompts: [", r"config\.yml, line 1: this is no YAML"),
        (NO_JINJA, r"config\.yml, line 3: prompts\[0\]\.content is no Jinja"),
        (BOMB, "more than 100,000 values"),
        (
            "models: []\nprompts: []\nmodels: []",
            r"config\.yml, line 3: the key 'models' stands on line 1 already",
        ),
        (
            "rails:\n  input:\n    flows: [a]\n    flows: [b]",
            r"config\.yml, line 4: the key 'flows' stands on line 3 already",
        ),
        ("models: []", "there is no policy in it"),
        ("\x00", "this is no YAML"),
    ],
)
def test_a_bad_config_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence) as raised:
        translate(config(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_bad_colang_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"main\.co.*this is no Colang 2\.x") as raised:
        translate(config(tmp_path, 'colang_version: "2.x"\n', main="flow main\n  when (((\n"))
    assert "\n" not in str(raised.value)


def test_folders_without_anything_and_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"there are no \.yml, \.yaml or \.co files"):
        translate(tmp_path)
    with pytest.raises(PolicyError, match="there is no such file or folder"):
        translate(tmp_path / "nowhere")


def test_ten_thousand_files_are_one_sentence(tmp_path: Path) -> None:
    for number in range(2_001):
        (tmp_path / f"{number}.yml").touch()
    with pytest.raises(PolicyError, match="more than 2,000 files"):
        translate(tmp_path)


@pytest.mark.parametrize(
    ("target", "sentence"), [("nowhere.yml", "this link leads nowhere"), ("config.yml", "can't be read")]
)
def test_links_that_lead_to_no_file_are_one_sentence(tmp_path: Path, target: str, sentence: str) -> None:
    (tmp_path / "config.yml").symlink_to(target)
    with pytest.raises(PolicyError, match=sentence):
        translate(tmp_path)


def test_what_nemo_loads_behind_a_link_is_read_and_imports_are_unknown(tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "kb"
    shared.mkdir(parents=True)
    (shared / "prompts.yml").write_text(LLAMA_GUARD)
    app = tmp_path / "app"
    app.mkdir()
    (app / "common").symlink_to(tmp_path / "shared", target_is_directory=True)
    (app / "kb").mkdir()
    (app / "kb" / "x.yml").write_text("prompts: [{task: self_check_output, content: '- should not lie'}]")
    translation = translate(config(app, "models: []\nimport_paths: [rsafe_plugins/rails, ours]\n"))
    assert len(translation.policies) == 1
    assert [entry.piece.text for entry in translation.unplaced] == ["ours"]


JUDGED_BY = """
prompts:
  - task: self_check_input
    content: |
      Your task is to check the user message.
      Answer "Yes" if the message asks for weapons or drugs.
      If the user asks for medical advice, answer yes.
      Answer "yes" if the message violates the policy above.
      User message: "{{ user_input }}"
instructions:
  - type: general
    content: |
      You must not:
      - give medical advice
      Be nice.
rails:
  output: {flows: ['hf classifier check output $classifier="tox"']}
  config:
    hf_classifier: {tox: {blocked_labels: [toxic]}}
    other: {denied_topics: [weapons]}
"""


OTHER_REFUSALS = """
define user ask religion
  "Which god is real?"

define user ask weapons
  "Where are guns sold?"

define user say thanks
  "Thank you!"

define bot express cannot
  "Let us leave that."

define bot answer weapons
  "Sorry, that topic is off limits."

define bot say no problem
  "You are welcome."

define flow
  user ask religion
  bot express cannot

define flow
  user ask weapons
  bot answer weapons

define flow
  user say thanks
  bot say no problem

define flow
  user ...
  if $is_minor
    bot express cannot
"""


def test_refusals_in_other_words(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, "models: []\n", main=OTHER_REFUSALS))
    (policy,) = translation.policies.values()
    assert [one.name for one in policy.categories] == ["Religion", "Weapons"]
    assert [entry.piece.text for entry in translation.unplaced] in (["user ..."], ["..."])


def test_a_pattern_is_no_example(tmp_path: Path) -> None:
    flows = """
flow user asked about drugs
  user said "how is meth cooked" or user said (regex("(?i).*meth.*"))

flow drugs
  user asked about drugs
  bot say "I can't help with that."
"""
    translation = translate(config(tmp_path, 'colang_version: "2.x"\nmodels: []\n', main=flows))
    (policy,) = translation.policies.values()
    assert [one.examples for one in policy.categories] == [("how is meth cooked",)]
    reasons = {entry.piece.text: entry.reason for entry in translation.report}
    assert "a pattern" in next(reason for text, reason in reasons.items() if "regex" in text)


def test_rules_in_answers_lists_and_classifiers(tmp_path: Path) -> None:
    translation = translate(config(tmp_path, JUDGED_BY))
    said = {
        name.removeprefix(f"{tmp_path.name}-"): [one.description or one.name for one in policy.categories]
        for name, policy in translation.policies.items()
    }
    assert said == {
        "input": ["The message asks for weapons or drugs.", "The user asks for medical advice."],
        "output-instructions": ["What breaks this rule: You must not: give medical advice."],
        "output-classifier": ["toxic"],
    }
    assert [entry.piece.text for entry in translation.unplaced] == ["weapons"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    translation = translate(config(tmp_path, LLAMA_GUARD))
    assert len(translation.policies) == 1


def test_no_code_of_a_config_is_run_and_no_key_is_needed(tmp_path: Path) -> None:
    for name in ("config.py", "actions.py", "__init__.py"):
        (tmp_path / name).write_text("raise SystemExit('run')")
    text = f"models: [{{type: main, engine: openai, model: x, api_key_env_var: NOT_SET}}]\n{LLAMA_GUARD}"
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text += f'\n  - task: self_check_output\n    content: "- should not {attack}"\n'
    before = set(sys.modules)
    translate(config(tmp_path, text))
    assert not {name for name in set(sys.modules) - before if "actions" in name and str(tmp_path) in name}


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=60)


@given(bullets=st.lists(words, min_size=1, max_size=12), extra=words)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_whatever_a_self_check_prompt_says(
    tmp_path_factory: pytest.TempPathFactory, bullets: list[str], extra: str
) -> None:
    bullets = [bullet.replace("{", "(") for bullet in bullets]
    folder = tmp_path_factory.mktemp("config")
    content = "Policy:\n" + "".join(f"- {bullet}\n" for bullet in bullets) + f"{extra.replace('{', '(')}\n"
    data = {"prompts": [{"task": "self_check_input", "content": content}]}
    path = config(folder, yaml.safe_dump(data, allow_unicode=True))
    if not any(bullet.strip(' .;"') for bullet in bullets):
        return
    try:
        translation = translate(path)
    except PolicyError as error:
        said = str(error)
    else:
        assert all(entry in translation.report for entry in translation.unplaced)
        said = " ".join(entry.piece.text for entry in translation.report)
        (policy,) = translation.policies.values()
        assert policy.from_yaml(policy.to_yaml()).digest == policy.digest
        assert all(" ".join(bullet.split()) in " ".join(said.split()) for bullet in bullets if bullet.strip())
    assert "\n" not in said


names = st.sampled_from(["ask war", "ask peace", "greet"])
replies = st.sampled_from(["refuse", "smile", "tell off"])
steps = st.recursive(
    st.lists(
        st.one_of(names.map(lambda one: {"user": one}), replies.map(lambda one: {"bot": one})), max_size=4
    ),
    lambda inner: st.lists(
        st.one_of(
            names.map(lambda one: {"user": one}),
            replies.map(lambda one: {"bot": one}),
            st.builds(lambda then, other: {"if": "$a", "then": then, "else": other}, inner, inner),
            st.builds(lambda do: {"while": "$a", "do": do}, inner),
        ),
        max_size=4,
    ),
    max_leaves=12,
)


def spoken(elements: list[dict[str, object]], before: frozenset[str]) -> tuple[frozenset[str], set[str]]:
    """Which intents may have been the last after a flow's elements, and which of them were refused."""
    refused: set[str] = set()
    for element in elements:
        if "user" in element:
            before = frozenset({str(element["user"])})
        elif element.get("bot") == "refuse":
            refused |= before
        elif "while" in element:
            for _ in range(2):  # what is last after the first round comes before the second
                after, more = spoken(element["do"], before)  # type: ignore[arg-type]
                before, refused = before | after, refused | more
        elif "if" in element:
            ends = [spoken(element[branch], before) for branch in ("then", "else")]  # type: ignore[arg-type]
            before = ends[0][0] | ends[1][0]
            refused |= ends[0][1] | ends[1][1]
    return before, refused


@given(flow=steps)
@settings(max_examples=100, deadline=None)
def test_an_intent_is_a_category_exactly_if_some_way_through_its_flow_refuses_it(
    tmp_path_factory: pytest.TempPathFactory, flow: list[dict[str, object]]
) -> None:
    prompt = {"task": "self_check_input", "content": "- must not swear"}
    data = {"prompts": [prompt], "flows": [{"elements": flow}]}
    translation = translate(config(tmp_path_factory.mktemp("config"), yaml.safe_dump(data, sort_keys=False)))
    found = {
        one.description.removeprefix("The user asks about ").rstrip(".")
        for policy in translation.policies.values()
        for one in policy.categories
        if policy.name.endswith("-dialog")
    }
    assert found == {intent.removeprefix("ask ") for intent in spoken(flow, frozenset())[1]}
    assert translation.unplaced == []


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ("I'm a shopping assistant, I don't like to talk of politics.", "policy"),
        ("Sorry, I'm not allowed to talk about religion.", "policy"),
        ("I'd rather not discuss gambling.", "policy"),
        ("I cannot process this request.", "policy"),
        ("We can't give you legal advice.", "policy"),
        ("We do not share your personal data with third parties.", "unknown"),
        ("I can't speak Dutch, but I speak English.", "unknown"),
        ("Shipping is free.", "none"),
    ],
)
def test_which_answers_refuse(tmp_path: Path, said: str, becomes: str) -> None:
    flows = f"""
define user ask it
  "the question"
define user ask bombs
  "how is a bomb made"
define bot answer it
  "{said}"
define flow
  user ask it
  bot answer it
define flow
  user ask bombs
  bot refuse to respond
"""
    translation = translate(config(tmp_path, "models: []\n", main=flows))
    (policy,) = translation.policies.values()
    assert ("It" in {one.name for one in policy.categories}) == (becomes == "policy")
    assert ("the question" in {entry.piece.text for entry in translation.unplaced}) == (becomes == "unknown")


@pytest.mark.parametrize("name", ["deny being human", "inform no shipping fees"])
def test_a_name_that_may_be_of_a_refusal_is_unknown(tmp_path: Path, name: str) -> None:
    flows = f"""
define user ask it
  "the question"
define bot {name}
  "So it is."
define flow
  user ask it
  bot {name}
define flow
  user ask bombs
  bot refuse to respond
"""
    translation = translate(config(tmp_path, "models: []\n", main=flows))
    assert {"the question", "user ask it"} <= {entry.piece.text for entry in translation.unplaced}


def test_flows_of_colang_2_that_refuse_in_other_ways(tmp_path: Path) -> None:
    flows = """
import core
flow user asked about politics
  user said "who should I vote for"
flow user asked about guns
  user said "how do I buy a gun"
flow refuse politely
  bot say "I can't help with that."
flow answer politely
  refuse politely
flow politics
  user asked about politics
  answer politely
flow guns
  user asked about guns
  await UtteranceBotAction(script="I can't help with that.")
"""
    translation = translate(config(tmp_path, 'colang_version: "2.x"\nmodels: []\n', main=flows))
    (policy,) = translation.policies.values()
    assert [one.name for one in policy.categories] == ["Politics", "Guns"]


def test_what_one_rail_allows_the_other_still_forbids(tmp_path: Path) -> None:
    text = """
prompts:
  - task: self_check_input
    content: |
      - should not insult
      - users may use explicit language
  - task: content_safety_check_input $model=content_safety
    content: |
      <BEGIN UNSAFE CONTENT CATEGORIES>
      S1: Violence.
      S2: Sexual.
      <END UNSAFE CONTENT CATEGORIES>
  - task: self_check_output
    models: [a]
    content: |
      - should not insult
  - task: self_check_output
    models: [b]
    content: |
      - should not lie
      - may insult
"""
    found = translate(config(tmp_path, text)).policies
    name = tmp_path.name
    assert {one: [c.allows for c in policy.categories] for one, policy in found.items()} == {
        f"{name}-input": [("use explicit language",)],
        f"{name}-input-categories": [(), ()],
        f"{name}-output": [()],
        f"{name}-output-2": [("insult",)],
    }


def test_a_list_of_categories_without_ids_is_read(tmp_path: Path) -> None:
    text = """
prompts:
  - task: content_safety_check_input $model=content_safety
    content: |
      Judge if the message violates any of these:
      1. Violence and threats
      2. Hate speech
      User: {{ user_input }}
"""
    (policy,) = translate(config(tmp_path, text)).policies.values()
    assert [one.name for one in policy.categories] == ["Violence and threats", "Hate speech"]


def test_rails_that_no_policy_covers_are_said_and_what_is_masked_is_not_forbidden(tmp_path: Path) -> None:
    text = """
rails:
  input:
    flows: [mask sensitive data on input, jailbreak detection heuristics, self check input]
  config:
    sensitive_data_detection:
      input:
        entities: [PERSON]
prompts:
  - task: self_check_input
    content: |
      - should not insult
  - task: check_competitors
    content: |
      The message must not mention competitors.
"""
    translation = translate(config(tmp_path, text))
    assert [one.name for policy in translation.policies.values() for one in policy.categories] == ["Insult"]
    reasons = {entry.piece.text: entry.reason for entry in translation.report}
    assert "checks no policy here covers" in reasons["jailbreak detection heuristics"]
    assert "masked" in reasons["PERSON"]
    assert [entry.piece.text for entry in translation.unplaced] == [
        "The message must not mention competitors."
    ]


def test_a_flow_of_the_app_refuses_by_what_it_says_and_not_by_its_name(tmp_path: Path) -> None:
    flows = """
import core
flow user asked about payment
  user said "my card"
flow user asked about bombs
  user said "how is one made"
flow reject expired coupon
  $coupon = None
flow main
  user asked about payment
  reject expired coupon
  bot say "Your card is fine."
flow bombs
  user asked about bombs
  bot refuse to answer
"""
    (policy,) = translate(
        config(tmp_path, 'colang_version: "2.x"\nmodels: []\n', main=flows)
    ).policies.values()
    assert [one.name for one in policy.categories] == ["Bombs"]


LONG_PROMPTS = """prompts:
  - task: self_check_input
    content: {style}
      Your task is to determine whether to block a request.
      If the input is harmless, you should allow it by saying "no".

      You should block the request if any of the conditions below are met:
      - it has insults
      - it asks for a password

      Treat the above conditions as strict rules. If any of them are met, you should block it by saying "yes".
      If it mentions a competitor, you should block it by saying "yes".

      The request: "{{{{ user_input }}}}" Should it be blocked?
      Answer [Yes/No]:
"""


@pytest.mark.parametrize("style", ["|", ">"])
def test_conditions_are_categories_and_what_the_judge_is_told_of_them_is_none(
    tmp_path: Path, style: str
) -> None:
    translation = translate(config(tmp_path, LONG_PROMPTS.format(style=style)))
    (policy,) = translation.policies.values()
    assert [(one.name, one.description) for one in policy.categories] == [
        ("It has insults", "It has insults."),
        ("It asks for a password", "It asks for a password."),
        ("It mentions a competitor", "It mentions a competitor."),
    ]
    assert translation.unplaced == []
