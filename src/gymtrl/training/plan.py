"""From settings to numbers: what a run will do, and TRL's configuration for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.training.settings import TrainSftSettings
from gymtrl.workspace.settings import nearest

if TYPE_CHECKING:
    from trl import SFTConfig

LARGE_DATA = 20_000
"""Rows above which one epoch is enough."""

OWN_OPTIONS = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "effective_batch",
    "warmup_steps": "warmup_ratio",
    "lr_scheduler_type": "scheduler",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "save_steps",
    "gradient_checkpointing": "gradient_checkpointing",
}
"""TRL's options that have a setting of their own, by that setting."""

FIXED_OPTIONS = (
    "output_dir",
    "save_strategy",
    "save_total_limit",
    "save_only_model",
    "resume_from_checkpoint",
    "ignore_data_skip",
    "logging_steps",
    "logging_strategy",
    "max_length",
    "remove_unused_columns",
    "load_best_model_at_end",
    "auto_find_batch_size",
    "push_to_hub",
    "eval_strategy",
    "eval_on_start",
    "shuffle_dataset",
    "dataset_kwargs",
    "packing",
    "completion_only_loss",
)
"""TRL's options that resuming, or the promise that every row is trained on as it is, depend on."""


@dataclass(frozen=True)
class Plan:
    """The resolved numbers of a run.

    Attributes:
        rows (`int`): Training rows.
        epochs (`float`): Passes over them.
        steps (`int`): Optimizer steps.
        effective_batch, micro_batch, accumulation (`int`): Rows a step, rows at once, and the quotient of the two.
        learning_rate (`float`): Peak.
        save_steps (`int`): Steps between checkpoints.
        gradient_checkpointing (`bool`): Recompute activations.
        cuda (`bool`): Train on a GPU, in bfloat16; else on CPU in float32.
    """

    rows: int
    epochs: float
    steps: int
    effective_batch: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    save_steps: int
    gradient_checkpointing: bool
    cuda: bool


def plan(settings: TrainSftSettings, *, rows: int, cuda: bool) -> Plan:
    """Fills in what the settings leave open.

    Args:
        settings (`TrainSftSettings`): As the user gave them.
        rows (`int`): Training rows.
        cuda (`bool`): A GPU will be used.

    Raises:
        UserError: `effective_batch` is no multiple of `micro_batch`.
    """
    epochs = settings.epochs if settings.epochs is not None else (1.0 if rows > LARGE_DATA else 2.0)
    effective = settings.effective_batch or min(max(round(rows * epochs / 50), 4), 32)
    micro = settings.micro_batch or _divisor(effective, 4 if cuda else 1)
    if effective % micro:
        if settings.effective_batch is not None:
            raise UserError(
                f"effective_batch {effective} is no multiple of micro_batch {micro}",
                remedy=f"set effective_batch to {math.ceil(effective / micro) * micro}",
            )
        effective = math.ceil(effective / micro) * micro
    steps = settings.max_steps or math.ceil(epochs * math.ceil(rows / effective))
    learning_rate = settings.learning_rate or (2e-4 if settings.method == "lora" else 1e-5)
    checkpointing = settings.gradient_checkpointing if settings.gradient_checkpointing is not None else cuda
    return Plan(
        rows=rows,
        epochs=epochs,
        steps=steps,
        effective_batch=effective,
        micro_batch=micro,
        accumulation=effective // micro,
        learning_rate=learning_rate,
        save_steps=settings.save_steps or math.ceil(steps / 10),
        gradient_checkpointing=checkpointing,
        cuda=cuda,
    )


def check_trl_options(options: dict[str, Any]) -> None:
    """Refuses what TRL does not know, what has a setting of its own, and what resuming depends on.

    Raises:
        UserError: Naming the nearest option or the setting to use.
    """
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    for key, value in options.items():
        if key not in known:
            raise UserError(
                f"trl: SFTConfig has no option '{key}'{nearest(key, known)}",
                remedy="see TRL's documentation of SFTConfig",
            )
        if key in OWN_OPTIONS:
            own = OWN_OPTIONS[key]
            raise UserError(f"trl: '{key}' is set by '{own}'", remedy=f"set {own} in place of trl.{key}")
        if key in FIXED_OPTIONS:
            raise UserError(
                f"trl: '{key}' cannot be changed: resuming depends on it, or that rows are trained on as they are",
                remedy="for that, train with the dataset's own train_with_trl.py",
            )
        if key == "model_init_kwargs" and not isinstance(value, dict):
            raise UserError(
                "trl: 'model_init_kwargs' is no mapping", remedy="give arguments of from_pretrained by name"
            )


def trl_config(settings: TrainSftSettings, plan: Plan, output: Path) -> SFTConfig:
    """Builds TRL's configuration.

    Raises:
        UserError: TRL refuses a value.
    """
    from trl import SFTConfig

    # Regrouping within an optimizer step saves padding and leaves the loss as it is; one row at a time needs none.
    # Its order ignores the seed, which is why the rows are shuffled before they get here.
    rebalance = plan.micro_batch > 1 and plan.accumulation > 1
    base_dtype = "bfloat16" if plan.cuda and settings.method == "lora" else "float32"
    options: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": None,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": plan.accumulation,
        "num_train_epochs": plan.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": plan.learning_rate,
        "warmup_steps": settings.warmup_ratio,
        "lr_scheduler_type": settings.scheduler,
        "seed": settings.seed,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "train_sampling_strategy": "batch_rebalance" if rebalance else "random",
        "use_cpu": not plan.cuda,
        "bf16": plan.cuda,
        "model_init_kwargs": {"dtype": base_dtype},
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": plan.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": plan.cuda,
    }
    merged = {"model_init_kwargs": options["model_init_kwargs"] | settings.trl.get("model_init_kwargs", {})}
    try:
        return SFTConfig(**(options | settings.trl | merged))
    except (ValueError, TypeError) as error:
        raise UserError(f"TRL refuses the settings: {error}", remedy="correct the option that it names") from error


def _divisor(number: int, most: int) -> int:
    return max(candidate for candidate in range(1, min(number, most) + 1) if number % candidate == 0)
