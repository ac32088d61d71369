"""What a recipe can say: the keys of the whole job, and the settings of each stage. Importing them is light."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field

from gymtrl.comparison.power_settings import PowerSettings
from gymtrl.comparison.settings import CompareSettings
from gymtrl.exports.settings import ExportSettings
from gymtrl.formats.settings import (
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatRewardSettings,
    FormatSftSettings,
)
from gymtrl.gym.settings import GymSetupSettings
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.settings import TrainDpoSettings, TrainGrpoSettings, TrainKtoSettings, TrainSftSettings
from gymtrl.validation.settings import ValidateSettings
from gymtrl.workspace.recipe import Recipe
from gymtrl.workspace.recipe import read_recipe as read
from gymtrl.workspace.settings import one_or_more

Objective = Literal["sft", "dpo", "kto", "grpo"]


class Stage(StrEnum):
    """The stages of a job, in order."""

    INSPECT = "inspect"
    FILTER = "filter"
    FORMAT = "format"
    TRAIN = "train"
    VALIDATE = "validate"


SECTIONS: dict[str, type[BaseModel]] = {
    "filter": FilterSettings,
    "format sft": FormatSftSettings,
    "format dpo": FormatDpoSettings,
    "format kto": FormatKtoSettings,
    "format grpo": FormatGrpoSettings,
    "format reward": FormatRewardSettings,
    "export": ExportSettings,
    "train sft": TrainSftSettings,
    "train dpo": TrainDpoSettings,
    "train kto": TrainKtoSettings,
    "train grpo": TrainGrpoSettings,
    "validate": ValidateSettings,
    "compare": CompareSettings,
    "power": PowerSettings,
    "gym setup": GymSetupSettings,
}
"""The stages that a recipe may have a section for, by verb, and their settings."""


class JobSettings(BaseModel, extra="forbid"):
    """What a recipe says of the whole job; `gymtrl run` needs it, the other verbs take the model from it."""

    rollouts: Annotated[list[Path], Field(min_length=1), BeforeValidator(one_or_more, list[Path] | Path)] = Field(
        description="Rollout files (JSONL, also packed), folders of them, or patterns: one, or a list",
        json_schema_extra={"source": "no default: they are what the job is about"},
    )
    model: str = Field(
        description="Model to train: a folder or a hub id (a folder where validate compares with it). Every stage "
        "takes it unless its section names another",
        json_schema_extra={"source": "no default: tokens belong to one model"},
    )
    out: Path | None = Field(
        default=None,
        description="Folder to write, with one folder a stage in it. Unset: runs/NAME, by the name of the rollouts",
        json_schema_extra={"source": "where the verbs write without -o"},
    )
    objective: Objective = Field(
        default="sft",
        description="What to train: sft on good rollouts, dpo on pairs of a good and a bad one, kto on good and bad "
        "ones, grpo on recorded groups (experimental)",
        json_schema_extra={"source": "ours: needs the least of the rollouts"},
    )


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe with the sections of all stages.

    Raises:
        UserError: See `gymtrl.workspace.recipe.read_recipe`.
    """
    return read(path, SECTIONS, JobSettings)
