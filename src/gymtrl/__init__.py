"""From NeMo Gym rollouts to a better model with TRL, with proof that it is better.

The names below are the public interface; each is loaded when it is first used, so importing this package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gymtrl.comparison.compare import compare_candidates as compare_candidates
    from gymtrl.comparison.compare import compare_files as compare_files
    from gymtrl.comparison.power_plan import plan_power as plan_power
    from gymtrl.comparison.power_settings import PowerSettings as PowerSettings
    from gymtrl.comparison.record import Comparison as Comparison
    from gymtrl.errors import GymtrlError as GymtrlError
    from gymtrl.errors import RunError as RunError
    from gymtrl.errors import UserError as UserError
    from gymtrl.exports.export import export_dataset as export_dataset
    from gymtrl.exports.settings import ExportSettings as ExportSettings
    from gymtrl.formats.grpo import format_grpo as format_grpo
    from gymtrl.formats.preference import format_dpo as format_dpo
    from gymtrl.formats.preference import format_reward as format_reward
    from gymtrl.formats.settings import FormatDpoSettings as FormatDpoSettings
    from gymtrl.formats.settings import FormatGrpoSettings as FormatGrpoSettings
    from gymtrl.formats.settings import FormatKtoSettings as FormatKtoSettings
    from gymtrl.formats.settings import FormatRewardSettings as FormatRewardSettings
    from gymtrl.formats.settings import FormatSftSettings as FormatSftSettings
    from gymtrl.formats.sft import format_sft as format_sft
    from gymtrl.formats.unpaired import format_kto as format_kto
    from gymtrl.gym.install import setup_gym as setup_gym
    from gymtrl.gym.settings import CollectSettings as CollectSettings
    from gymtrl.gym.settings import GymSetupSettings as GymSetupSettings
    from gymtrl.models.smollm2 import make_smollm2 as make_smollm2
    from gymtrl.rollouts.inspection import inspect_rollouts as inspect_rollouts
    from gymtrl.rollouts.reader import read_lines as read_lines
    from gymtrl.rollouts.record import Rollout as Rollout
    from gymtrl.selection.filter import filter_rollouts as filter_rollouts
    from gymtrl.selection.settings import FilterSettings as FilterSettings
    from gymtrl.training.groups import recompute_log_probs as recompute_log_probs
    from gymtrl.training.preference import TokenDPOTrainer as TokenDPOTrainer
    from gymtrl.training.replay import RecordedGroupConfig as RecordedGroupConfig
    from gymtrl.training.replay import RecordedGroupTrainer as RecordedGroupTrainer
    from gymtrl.training.run import train as train
    from gymtrl.training.settings import TrainDpoSettings as TrainDpoSettings
    from gymtrl.training.settings import TrainGrpoSettings as TrainGrpoSettings
    from gymtrl.training.settings import TrainKtoSettings as TrainKtoSettings
    from gymtrl.training.settings import TrainSftSettings as TrainSftSettings
    from gymtrl.training.unpaired import TokenKTOTrainer as TokenKTOTrainer
    from gymtrl.validation.collection import collect_rollouts as collect_rollouts
    from gymtrl.validation.session import gym_session as gym_session
    from gymtrl.validation.settings import ValidateSettings as ValidateSettings
    from gymtrl.validation.validate import validate as validate

_HOMES = {
    "comparison.compare": ("compare_candidates", "compare_files"),
    "comparison.power_plan": ("plan_power",),
    "comparison.power_settings": ("PowerSettings",),
    "comparison.record": ("Comparison",),
    "errors": ("GymtrlError", "RunError", "UserError"),
    "exports.export": ("export_dataset",),
    "exports.settings": ("ExportSettings",),
    "formats.grpo": ("format_grpo",),
    "formats.preference": ("format_dpo", "format_reward"),
    "formats.settings": (
        "FormatDpoSettings",
        "FormatGrpoSettings",
        "FormatKtoSettings",
        "FormatRewardSettings",
        "FormatSftSettings",
    ),
    "formats.sft": ("format_sft",),
    "formats.unpaired": ("format_kto",),
    "gym.install": ("setup_gym",),
    "gym.settings": ("CollectSettings", "GymSetupSettings"),
    "models.smollm2": ("make_smollm2",),
    "rollouts.inspection": ("inspect_rollouts",),
    "rollouts.reader": ("read_lines",),
    "rollouts.record": ("Rollout",),
    "selection.filter": ("filter_rollouts",),
    "selection.settings": ("FilterSettings",),
    "training.groups": ("recompute_log_probs",),
    "training.preference": ("TokenDPOTrainer",),
    "training.replay": ("RecordedGroupConfig", "RecordedGroupTrainer"),
    "training.run": ("train",),
    "training.settings": ("TrainDpoSettings", "TrainGrpoSettings", "TrainKtoSettings", "TrainSftSettings"),
    "training.unpaired": ("TokenKTOTrainer",),
    "validation.collection": ("collect_rollouts",),
    "validation.session": ("gym_session",),
    "validation.settings": ("ValidateSettings",),
    "validation.validate": ("validate",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gymtrl' has no attribute '{name}'")
    return getattr(import_module(f"gymtrl.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
