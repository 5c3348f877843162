import contextlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rsafe_plugins.errors import PolicyError
from rsafe_plugins.policy import CONTENT_KINDS, Category, Policy

printable = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40)
filled = printable.filter(str.strip)
ids = filled.filter(lambda text: not set(" ,;<>{}[]\\|\u00a6") & set(text) and text.isprintable())
categories = st.builds(
    Category,
    id=ids,
    name=filled,
    description=printable,
    covers=st.lists(filled, max_size=3).map(tuple),
    allows=st.lists(filled, max_size=3).map(tuple),
    applies_to=st.lists(st.sampled_from(CONTENT_KINDS), min_size=1).map(tuple),
)
policies = st.builds(
    Policy,
    name=filled,
    description=printable,
    categories=st.lists(
        categories,
        min_size=1,
        max_size=5,
        unique_by=(lambda category: category.id.casefold(), lambda category: category.name.casefold()),
    ).map(tuple),
)


def policy(*categories: Category, name: str = "test") -> Policy:
    return Policy(name=name, categories=categories or (Category(id="A", name="Arson"),))


@given(policies)
def test_yaml_and_json_give_back_the_same_policy_and_digest(original: Policy) -> None:
    for copy in (Policy.from_yaml(original.to_yaml()), Policy.from_json(original.to_json())):
        assert copy == original
        assert copy.digest == original.digest


@given(policies)
def test_every_text_of_a_policy_is_on_one_line(policy: Policy) -> None:
    for category in policy.categories:
        for text in (category.id, category.name, category.description, *category.covers, *category.allows):
            assert len(text.splitlines()) <= 1
            assert text == text.strip()


@given(policies)
def test_each_category_is_found_by_its_id_in_any_case(policy: Policy) -> None:
    for category in policy.categories:
        assert policy.find(category.id) == category
        assert policy.find(category.id.casefold()) == category
        assert policy.category(category.id) == category


@given(policies, st.text())
def test_find_and_category_take_any_text(policy: Policy, text: str) -> None:
    found = policy.find(text)
    assert found is None or found in policy.categories
    with contextlib.suppress(PolicyError):
        assert policy.category(text) in policy.categories


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML"])
def test_a_saved_policy_loads_again(tmp_path, suffix):
    original = Policy.load("rsafe-18")
    path = tmp_path / f"policy{suffix}"
    original.save(path)
    assert Policy.load(path) == Policy.load(str(path)) == original


def test_line_breaks_in_text_become_single_spaces():
    category = Category(id="A", name=" two\n words ", description="one\r\n\ttwo\u2028three")
    assert category.name == "two words"
    assert category.description == "one two three"


def test_kinds_of_content_are_kept_in_one_order_without_repeats():
    category = Category(id="A", name="a", applies_to=("tool_result", "prompt", "tool_result"))
    assert category.applies_to == ("prompt", "tool_result")


def test_a_category_applies_to_every_kind_unless_it_says_otherwise():
    assert Category(id="A", name="a").applies_to == CONTENT_KINDS


@pytest.mark.parametrize("id", ["", " ", "a b", "a\tb", "a,b", "a;b", "a\x00", "a\u200b", "\ud800", "x" * 65])
def test_an_id_that_is_not_one_short_word_is_refused(id):
    with pytest.raises(ValidationError):
        Category(id=id, name="a")


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x85", "\x9b", "\ud800"])
def test_control_characters_are_refused_in_every_text(character):
    text = f"a{character}b"
    for fields in ({"name": text}, {"description": text}, {"covers": [text]}, {"allows": [text]}):
        with pytest.raises(ValidationError, match=f"U\\+{ord(character):04X}"):
            Category.model_validate({"id": "A", "name": "a", **fields})


@pytest.mark.parametrize(
    ("first", "second"),
    [(("a", "x"), ("A", "y")), (("a", "Arson"), ("b", "ARSON")), (("a", "é"), ("b", "e\u0301"))],
)
def test_two_categories_with_one_id_or_name_are_refused_whatever_the_case(first, second):
    with pytest.raises(ValidationError, match="give each category its own"):
        policy(*(Category(id=id, name=name) for id, name in (first, second)))


def test_a_policy_holds_from_1_to_200_categories():
    numbered = [Category(id=str(n), name=f"n{n}") for n in range(201)]
    assert len(policy(*numbered[:200]).categories) == 200
    for wrong in ([], numbered):
        with pytest.raises(ValidationError):
            Policy(name="p", categories=tuple(wrong))


def test_policies_are_values():
    assert policy() == policy()
    assert hash(policy()) == hash(policy())
    assert pickle.loads(pickle.dumps(policy())) == policy()
    with pytest.raises(ValidationError):
        policy().name = "other"


def test_reading_digest_and_finding_leave_a_policy_equal_to_a_fresh_one():
    used = policy()
    assert used.digest
    assert used.find("A")
    assert used == policy()
    assert used.model_dump() == policy().model_dump()
    assert used.to_yaml() == policy().to_yaml()


def test_digest_is_the_same_in_every_process_and_version():
    assert policy().digest == "9fd41c568cfccbf7a53daa48f246d419720debc3fc7241a8d576742fe313b6bb"


def test_digest_leaves_out_the_name_and_description_of_the_policy():
    assert Policy(name="a", description="b", categories=policy().categories).digest == policy().digest


@pytest.mark.parametrize(
    "change",
    [
        {"id": "B"},
        {"name": "b"},
        {"description": "b"},
        {"covers": ("b",)},
        {"allows": ("b",)},
        {"applies_to": ("prompt",)},
    ],
)
def test_digest_changes_with_everything_in_a_category(change):
    category = Category(id="A", name="Arson")
    assert policy(category.model_copy(update=change)).digest != policy(category).digest


def test_digest_changes_with_the_order_of_categories():
    a, b = Category(id="A", name="a"), Category(id="B", name="b")
    assert policy(a, b).digest != policy(b, a).digest


def test_a_changed_copy_has_its_own_digest_and_is_validated():
    original = policy()
    before = original.digest
    changed = original.model_copy(update={"categories": (Category(id="B", name="b"),)})
    assert changed.digest != before
    assert changed.find("A") is None
    with pytest.raises(ValidationError):
        original.model_copy(update={"categories": ()})


def test_for_kind_keeps_the_categories_that_apply_in_order():
    a = Category(id="A", name="a", applies_to=("prompt", "document"))
    b = Category(id="B", name="b", applies_to=("response",))
    c = Category(id="C", name="c")
    assert policy(c, b, a).for_kind("document").categories == (c, a)
    assert policy(c, b, a).for_kind("document").name == "test"


def test_for_kind_gives_the_policy_itself_where_all_of_it_applies():
    whole = policy()
    assert whole.for_kind("prompt") is whole


def test_for_kind_says_so_where_no_category_applies():
    only = policy(Category(id="A", name="a", applies_to=("prompt",)))
    with pytest.raises(PolicyError, match=r"^No category of the policy 'test' applies .* 'tool_call'; .*\.$"):
        only.for_kind("tool_call")


def test_an_unknown_category_is_an_error_that_names_the_nearest():
    with pytest.raises(PolicyError, match=r"has no category 'u99' \(did you mean 'U9'\?\); it can be U1, U2"):
        Policy.load("rsafe-18").category("u99")


@pytest.mark.parametrize(
    "text",
    [
        "U1",
        "u1",
        " U1. ",
        "(U1)",
        "Violence & Physical Harm",
        "violence and physical harm",
        "Violence  &\nphysical-harm",
        "U1: Violence & Physical Harm",
        "**U1** (Violence and Physical Harm)",
    ],
)
def test_find_knows_a_category_by_every_usual_spelling(text):
    found = Policy.load("rsafe-18").find(text)
    assert found is not None
    assert found.id == "U1"


@pytest.mark.parametrize("text", ["", " ", "&", "?", "U", "U19", "U1 U2", "Violence", "11"])
def test_find_guesses_nothing(text):
    assert Policy.load("rsafe-18").find(text) is None


def test_find_puts_the_exact_spelling_first_and_an_id_before_a_name():
    exact = policy(Category(id="A-1", name="B"), Category(id="A.1", name="c"), Category(id="B", name="d"))
    for text, id in {"a.1": "A.1", "A-1": "A-1", "b": "B"}.items():
        found = exact.find(text)
        assert found is not None
        assert found.id == id


def test_a_name_of_only_punctuation_is_found_by_itself_alone():
    odd = policy(Category(id="A", name="!!!"))
    assert odd.find("!!!") is not None
    assert odd.find("???") is None
    assert odd.find("") is None
