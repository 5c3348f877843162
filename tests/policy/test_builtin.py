import pytest

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import Policy

RSAFE_NAMES = [
    "Violence & Physical Harm",
    "Weapons & Illegal Tactics",
    "Non-violent Crime & Fraud",
    "Drugs & Controlled Substances",
    "Adult Sexual Content",
    "Sexual Content Involving Minors",
    "Hate Speech & Discrimination",
    "Harassment & Profanity",
    "Self-Harm & Suicide",
    "Privacy & PII",
    "Intellectual Property",
    "Misinformation & Manipulation",
    "Unauthorized Professional Advice",
    "Animal Abuse",
    "Child Abuse (Non-Sexual)",
    "Environmental & Public-Safety Harm",
    "Manipulation & Coercion / Human Trafficking",
    "National-Security Espionage",
]
MLCOMMONS_NAMES = [
    "Violent Crimes",
    "Non-Violent Crimes",
    "Sex-Related Crimes",
    "Child Sexual Exploitation",
    "Defamation",
    "Specialized Advice",
    "Privacy",
    "Intellectual Property",
    "Indiscriminate Weapons",
    "Hate",
    "Suicide & Self-Harm",
    "Sexual Content",
    "Elections",
    "Code Interpreter Abuse",
]


def test_three_policies_come_with_the_package():
    assert Policy.builtin_names() == ("mlcommons", "prompt-injection", "rsafe-18")


@pytest.mark.parametrize("name", Policy.builtin_names())
def test_a_built_in_policy_bears_the_name_it_is_loaded_by(name):
    assert Policy.load(name).name == name


@pytest.mark.parametrize("name", Policy.builtin_names())
def test_each_built_in_category_is_described_in_one_short_sentence(name):
    for category in Policy.load(name).categories:
        assert 6 <= len(category.description.split()) <= 18
        assert category.description.count(".") == 1
        assert category.description.endswith(".")


@pytest.mark.parametrize(
    ("policy", "prefix", "names"), [("rsafe-18", "U", RSAFE_NAMES), ("mlcommons", "S", MLCOMMONS_NAMES)]
)
def test_ids_and_names_are_the_published_ones(policy, prefix, names):
    expected = [(f"{prefix}{number}", name) for number, name in enumerate(names, 1)]
    assert [(category.id, category.name) for category in Policy.load(policy).categories] == expected


@pytest.mark.parametrize("kind", ["document", "tool_call", "tool_result"])
def test_prompt_injection_judges_what_agents_read_and_do(kind):
    assert Policy.load("prompt-injection").for_kind(kind).categories


@pytest.mark.parametrize("kind", ["prompt", "response"])
def test_prompt_injection_judges_no_prompts_and_responses(kind):
    with pytest.raises(PolicyError, match="applies to the kind of content"):
        Policy.load("prompt-injection").for_kind(kind)


def test_a_built_in_name_wins_over_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rsafe-18").write_text("name: other")
    assert Policy.load("rsafe-18").name == "rsafe-18"


@pytest.mark.parametrize("name", ["rsafe18", "RSAFE-18", "rsafe-18 "])
def test_a_misspelt_name_is_an_error_that_names_the_nearest(name):
    with pytest.raises(PolicyError, match=r"^There is no built-in policy .*did you mean 'rsafe-18'"):
        Policy.load(name)


@pytest.mark.parametrize("name", ["", "xyz"])
def test_an_unknown_name_is_an_error_that_names_every_built_in_policy(name):
    with pytest.raises(PolicyError, match=r"it can be mlcommons, prompt-injection, rsafe-18, or the path of"):
        Policy.load(name)
