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
from rsafe_plugins.policy.translate import Translation, translate
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


@pytest.mark.parametrize("name", ["abc", "abc_v2", "hello_world"])
def test_configs_that_nemo_ships_are_translated_whole(name: str) -> None:
    """Run with GOLDEN=write to renew the files, and read what changed."""
    translation = translate(SHIPPED / "examples" / "bots" / name)
    assert translation.unplaced == []
    golden = GOLDEN / f"{name}.txt"
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
def test_what_nemo_ships_without_a_policy_says_so(path: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"there is no policy in it: read as nemo, it has \d+ pieces of text"
    ):
        translate(path)


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
    assert found["eval"].categories[0].applies_to == ("prompt", "response")
    assert [one.id for one in found["output-sensitive-data"].categories] == ["EMAIL_ADDRESS", "PERSON"]
    assert [one.name for one in found["input-classifier"].categories] == ["toxic"]
    reasons = {entry.piece.text: entry.reason for entry in translation.report}
    assert "keep that rail" in reasons["\\bfoo\\b"]
    assert reasons["Is this a fact?"] == "checks facts, which is no safety policy"
    assert translation.unplaced == []


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
            "Messages that talk about planes.",
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
        assert translation.unplaced == []
        said = " ".join(entry.piece.text for entry in translation.report)
        (policy,) = translation.policies.values()
        assert policy.from_yaml(policy.to_yaml()).digest == policy.digest
        assert all(" ".join(bullet.split()) in " ".join(said.split()) for bullet in bullets if bullet.strip())
    assert "\n" not in said
