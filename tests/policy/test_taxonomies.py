"""Which categories of rsafe-18 a policy leaves out."""

from __future__ import annotations

import pytest

from rsafe_plugins import Category, Policy
from rsafe_plugins.policy.taxonomies import corresponding, left_out
from rsafe_plugins.policy.translate.names import KNOWN

ALL = Policy.load("rsafe-18")


def policy(*categories: Category) -> Policy:
    return Policy(name="house", categories=categories)


def missing(*categories: Category) -> set[str]:
    """What a policy with these isn't recognized to have."""
    return {one.id for one in left_out(policy(*categories), "prompt")}


def has(name: str, description: str = "") -> set[str]:
    return {one.id for one in ALL.categories} - missing(Category(id="A", name=name, description=description))


def test_what_is_taken_out_of_rsafe_18_is_left_out() -> None:
    assert left_out(ALL, "prompt") == ()
    kept = tuple(one for one in ALL.categories if one.id not in ("U2", "U7"))
    assert [one.id for one in left_out(policy(*kept), "response")] == ["U2", "U7"]
    # Neighbours share words, and are recognized by their names alone.
    assert has("Sexual Content Involving Minors") == {"U6"}
    # Unless more is said of one.
    assert has("Intellectual Property", "Stolen secrets of companies, and insults to inventors.") >= {
        "U11",
        "U8",
    }


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("Non-Violent Crimes", {"U3", "U4", "U17", "U18"}),
        ("violence,aiding_and_abetting,incitement", {"U1"}),
        ("animal_abuse", {"U14"}),
        ("self-harm/intent", {"U9"}),
    ],
)
def test_names_of_other_taxonomies_are_recognized(name: str, ids: set[str]) -> None:
    assert ids <= has(name)


@pytest.mark.parametrize(
    ("name", "description", "identifier"),
    [
        ("no weapons", "guns, bombs, poison: not how to make them, get them or use them", "U2"),
        ("Be nice", "Don't insult or bully anybody.", "U8"),
        ("Doxxing", "", "U10"),
    ],
)
def test_an_own_category_is_recognized_by_its_words(name: str, description: str, identifier: str) -> None:
    assert identifier in has(name, description)


@pytest.mark.parametrize(
    ("name", "description", "identifiers"),
    [
        ("Illegal activity", "", {"U3", "U4", "U11", "U16", "U17", "U18"}),
        ("Sexual content", "No sexual content at all.", {"U5", "U6"}),
        ("Crime & Fraud", "Theft, scams or other crimes.", {"U3", "U4", "U17"}),
        ("Abuse", "", {"U6", "U8", "U15"}),
    ],
)
def test_a_broad_category_is_taken_for_all_that_it_could_mean(
    name: str, description: str, identifiers: set[str]
) -> None:
    assert identifiers <= has(name, description)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_categories_that_are_translated_from_names_mean_at_least_what_the_table_says(name: str) -> None:
    title, description = KNOWN[name]
    category = Category(id=name, name=title, description=description)
    left = {one.id for one in left_out(policy(category), "prompt")}
    assert left.isdisjoint(corresponding(name, "openai", "rsafe-18"))


def test_with_a_category_that_nobody_recognizes_nothing_is_left_out() -> None:
    hate = Category(id="A", name="Hate")
    assert missing(hate)
    assert missing(hate, Category(id="B", name="Competitors", description="Our rivals' products.")) == set()
    for name, description in (
        ("Haß auf Gruppen", ""),
        ("Violencia, drogas y armas", ""),
        ("Exploitation des mineurs", ""),
        (
            "Competitors",
            "Our rivals' products, even where the user asks explicitly for sexual or illegal ones.",
        ),
        ("Kidney disease", "Advice on drugs."),
        ("Harmful content", "Anything illegal."),
        ("Not about us", "Drugs."),
        ("Violence", "Violence, and everything else that is disturbing."),
        ("Hate Speech", "Hate, and any other content that is not suitable for pupils."),
        ("Harassment", "Whatever our lawyers would not like."),
        ("Violence and more", ""),
    ):
        assert missing(hate, Category(id="B", name=name, description=description)) == set(), name


def test_only_categories_for_the_kind_of_content_count() -> None:
    hate = Category(id="A", name="Hate", applies_to=("prompt",))
    drugs = Category(id="B", name="Illegal drugs", applies_to=("response",))
    assert "U4" in {one.id for one in left_out(policy(hate, drugs), "prompt")}
    assert "U4" not in {one.id for one in left_out(policy(hate, drugs), "response")}
    assert left_out(policy(hate), "response") == ()


def test_the_names_that_a_data_set_gives_stand_for_the_ids() -> None:
    for name, id in (("Violence", "S1"), ("Hate/Identity Hate", "S8"), ("Malware", "S17")):
        assert corresponding(name, "nemotron", "rsafe-18") == corresponding(id, "nemotron", "rsafe-18") != ()
