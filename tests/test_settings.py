"""Settings: default, recipe, flag; unknown keys and bad values."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymtrl.errors import UserError
from gymtrl.formats.settings import FormatGrpoSettings
from gymtrl.pipeline.sections import read_recipe
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.settings import TrainSftSettings
from gymtrl.workspace.recipe import Recipe
from gymtrl.workspace.settings import resolve


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("filter:\n  cap_per_task: 2\n  validation: 0.3\ntrain sft:\n  trl: {optim: sgd}\n")
    return read_recipe(path)


def test_later_ones_win_and_say_where_they_came_from(recipe: Recipe) -> None:
    resolved = resolve(FilterSettings, section="filter", recipe=recipe, flags={"validation": 0.5, "cluster": None})
    assert (resolved.settings.cap_per_task, resolved.settings.validation) == (2, 0.5)
    assert resolved.origins["cap_per_task"] == f"recipe {recipe.path}:2"
    assert resolved.origins["validation"] == "flag --validation"
    assert resolved.origins["seed"].startswith("default")


def test_set_reaches_into_mappings(recipe: Recipe) -> None:
    resolved = resolve(TrainSftSettings, section="train sft", recipe=recipe, sets=["trl.adam_beta2=0.95", "epochs=3"])
    assert resolved.settings.trl == {"optim": "sgd", "adam_beta2": 0.95}
    assert resolved.settings.epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filter: {cap_per_tsk: 2}", "did you mean 'cap_per_task'"),
        ("filtre: {}", "did you mean 'filter'"),
        ("filter: [1]", "settings by name"),
        ("filter: {a: b: c}", "not YAML"),
        ("filter: {cap_per_task: many}", "cap_per_task = 'many'"),
    ],
)
def test_bad_recipe_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(FilterSettings, section="filter", recipe=read_recipe(path))


def test_missing_required_setting() -> None:
    from gymtrl.formats.settings import FormatSftSettings

    with pytest.raises(UserError, match="model is required"):
        resolve(FormatSftSettings, section="format sft")


def test_settings_that_do_not_go_together_are_told_in_words() -> None:
    given = {"model": "m", "group_size": 4}
    with pytest.raises(UserError) as caught:
        resolve(FormatGrpoSettings, section="format grpo", flags=given)
    assert caught.value.message.startswith("group_size has no effect on prompts")
