"""Preference training with TRL's `DPOTrainer`, on pairs whose loss-bearing tokens are marked.

Run as: gymtrl train dpo DATASET -o RUN
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymtrl.training.data import Sequence, TrainingData
from gymtrl.training.objective import Defaults, Objective, Parts
from gymtrl.training.settings import TrainDpoSettings

if TYPE_CHECKING:
    from transformers import Trainer


def _config() -> type[Any]:
    from trl import DPOConfig

    config: type[Any] = DPOConfig
    return config


def _trainer(parts: Parts) -> Trainer:
    from gymtrl.training.preference import TokenDPOTrainer

    return TokenDPOTrainer(**parts.arguments())


def _options(settings: TrainDpoSettings, data: TrainingData) -> dict[str, Any]:
    weights = {"loss_weights": settings.loss_weights} if settings.loss_weights else {}
    return {"beta": settings.beta, "loss_type": settings.loss_type, **weights}


_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)

DPO = Objective(
    name="dpo",
    made_by="format dpo",
    trainer_name="DPOTrainer",
    settings=TrainDpoSettings,
    sequences=(
        Sequence(("prompt_ids", "chosen_ids"), "chosen_mask"),
        Sequence(("prompt_ids", "rejected_ids"), "rejected_mask"),
    ),
    defaults=Defaults(
        lora_rate=5e-6,
        full_rate=1e-6,
        rate_source="TRL; OLMo 3; Tülu 3 takes 5e-7",
        epochs=1.0,
        epochs_source="Tülu 3",
        least_batch=4,
        most_batch=64,
        batch_source="Tülu 3: 64; ours: small data still gets its steps",
    ),
    config=_config,
    trainer=_trainer,
    options=_options,
    free_micro=False,
    losses=_LOSSES,
    own_options={"beta": "beta", "loss_type": "loss_type", "loss_weights": "loss_weights"},
    fixed_options=("padding_free",),
)
