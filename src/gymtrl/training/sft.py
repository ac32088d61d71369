"""Supervised fine-tuning with TRL's `SFTTrainer`, on ids and labels as they are.

Run as: gymtrl train sft DATASET -o RUN
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymtrl.training.data import Sequence
from gymtrl.training.objective import Defaults, Objective, Parts, no_options
from gymtrl.training.settings import TrainSftSettings

if TYPE_CHECKING:
    from transformers import Trainer


def _config() -> type[Any]:
    from trl import SFTConfig

    config: type[Any] = SFTConfig
    return config


def _trainer(parts: Parts) -> Trainer:
    from trl import SFTTrainer

    return SFTTrainer(**parts.arguments())


SFT = Objective(
    name="sft",
    made_by="format sft",
    trainer_name="SFTTrainer",
    settings=TrainSftSettings,
    sequences=(Sequence(("input_ids",), "labels"),),
    defaults=Defaults(
        lora_rate=2e-4,
        full_rate=1e-5,
        rate_source="LoRA Without Regret: about ten times that of full training",
        epochs=2.0,
        epochs_source="Tülu 3",
        least_batch=4,
        most_batch=32,
        batch_source="LoRA Without Regret: large batches hurt; ours: small data still gets its steps",
    ),
    config=_config,
    trainer=_trainer,
    options=no_options,
    losses=("nll", "dft"),
    fixed_options=("packing", "completion_only_loss", "shuffle_dataset"),
)
