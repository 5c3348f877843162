from pathlib import Path

import pytest

from rsafe_plugins.alignment.recipe import (
    Distillation,
    GRPOSettings,
    StageSettings,
    WarmStartSettings,
    load_recipe,
    recipe_names,
)
from rsafe_plugins.errors import SettingsError


@pytest.mark.parametrize(
    ("stage", "names"),
    [(WarmStartSettings, {"embedded", "embedded-categories"}), (GRPOSettings, {"embedded", "rsafe-7b"})],
)
def test_the_packages_recipes_can_be_used(stage: type[StageSettings], names: set[str]) -> None:
    assert set(recipe_names(stage)) == names
    for name in names:
        assert isinstance(load_recipe(stage, name, {}), stage)


def test_the_embedded_recipes_fit_together() -> None:
    first, second = load_recipe(WarmStartSettings, "embedded", {}), load_recipe(GRPOSettings, "embedded", {})
    assert (first.base, first.rank, first.first_layer) == (second.base, second.rank, second.first_layer)


def test_the_7b_recipe_is_the_papers() -> None:
    recipe = load_recipe(GRPOSettings, "rsafe-7b", {})
    assert recipe.base == "Qwen/Qwen2.5-7B-Instruct"
    assert recipe.full
    assert (recipe.learning_rate, recipe.epochs, recipe.batch, recipe.group_size) == (1e-7, 3, 32, 4)
    assert (recipe.max_tokens, recipe.temperature, recipe.top_p) == (512, 0.7, 0.8)
    assert recipe.repetition_penalty == 1.05
    assert (recipe.accuracy_weight, recipe.format_weight) == (0.9, 0.1)
    assert (recipe.length_weight, recipe.adherence_weight, recipe.skip_solved) == (0, 0, False)
    assert recipe.policies.whole == 1


def test_options_win_over_the_recipe_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("batch: 8\ngroup_size: 6\npolicies: {whole: 0.5, names: 0.25}\n")
    settings = load_recipe(GRPOSettings, path, {"batch": 2, "policies.whole": 0.1})
    assert (settings.batch, settings.group_size) == (2, 6)
    assert (settings.policies.whole, settings.policies.names) == (0.1, 0.25)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grop_size: 4", "grop_size, which there is not"),
        ("policies: {hole: 1}", r"policies\.hole, which there is not; expected one of whole, names"),
        ("batch: 0", "batch: Input should be greater than or equal to 1"),
        ("policies: {whole: 0.8, names: 0.3}", "policies: whole, names and reworded"),
        ("adherence_weight: 0.1", "adherence_weight needs scale: batch"),
        ("{adherence_weight: 0.1, scale: batch, batch: 3}", "even batch"),
        ("- batch", "must hold settings"),
        ("batch: [", "can't be read"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=says) as error:
        load_recipe(GRPOSettings, path, {})
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_is_told_beside_those_that_are() -> None:
    with pytest.raises(SettingsError, match=r"embedded, rsafe-7b, and there is no rsafe-8b"):
        load_recipe(GRPOSettings, "rsafe-8b", {})


def test_a_part_that_is_set_leaves_the_others_as_they_are() -> None:
    settings = load_recipe(WarmStartSettings, None, {"policies.user_words": 0.5})
    assert settings.policies == WarmStartSettings().policies.model_copy(update={"user_words": 0.5})
    settings = load_recipe(WarmStartSettings, None, {"distill.responses": 1})
    assert settings.distill == Distillation(responses=1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distill.prompt": 1}, r"setting distill\.prompt, .* prompts, responses, documents\."),
        ({"policies.whloe": 1}, r"setting policies\.whloe, .* whole, names"),
        ({"distill.prompts": 1.5}, r"distill\.prompts: .* less than or equal to 1"),
        ({"distill": 1}, r"distill: .* valid dictionary"),
    ],
)
def test_a_part_that_is_not_there_or_out_of_range_is_one_sentence(
    options: dict[str, object], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        load_recipe(WarmStartSettings, None, options)
    with pytest.raises(SettingsError, match=r"no setting batch\.x: batch has no parts"):
        load_recipe(WarmStartSettings, None, {"batch.x": 7})
