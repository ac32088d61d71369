"""Settings: default, recipe, flag; unknown keys and bad values."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymtrl.errors import UserError
from gymtrl.formats.settings import FormatGrpoSettings
from gymtrl.pipeline.schema import recipe_schema
from gymtrl.pipeline.sections import read_recipe
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.settings import TrainDpoSettings, TrainSftSettings
from gymtrl.workspace.artefact import artefact, up_to_date
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


def test_one_text_stands_for_a_list_of_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("train dpo: {report_to: wandb, loss_type: sigmoid}")
    settings = resolve(TrainDpoSettings, section="train dpo", recipe=read_recipe(path)).settings
    assert (settings.report_to, settings.loss_type) == (["wandb"], ["sigmoid"])
    assert TrainDpoSettings(loss_type=["ipo", "sft"]).loss_type == ["ipo", "sft"]
    shapes = recipe_schema()["$defs"]["TrainDpoSettings"]["properties"]
    assert all({"type": "string"} in shapes[name]["anyOf"] for name in ("report_to", "loss_type"))


def test_another_tracker_asks_for_no_other_model(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text("x")
    with artefact(tmp_path / "run", verb="train sft", settings=TrainSftSettings(), inputs=[source]):
        pass
    same = TrainSftSettings(report_to=["wandb"])
    assert up_to_date(tmp_path / "run", verb="train sft", settings=same, inputs=[source]) is not None
    other = TrainSftSettings(seed=1)
    assert up_to_date(tmp_path / "run", verb="train sft", settings=other, inputs=[source]) is None
