"""Training on good and bad rollouts that are not paired, with TRL's `KTOTrainer`.

Run as: gymtrl train kto DATASET -o RUN
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymtrl.training.data import Sequence, TrainingData
from gymtrl.training.objective import Defaults, Objective, Parts
from gymtrl.training.settings import TrainKtoSettings

if TYPE_CHECKING:
    from transformers import Trainer


def _config() -> type[Any]:
    from trl import KTOConfig

    config: type[Any] = KTOConfig
    return config


def _trainer(parts: Parts) -> Trainer:
    from gymtrl.training.unpaired import TokenKTOTrainer

    return TokenKTOTrainer(**parts.arguments())


def _options(settings: TrainKtoSettings, data: TrainingData) -> dict[str, Any]:
    computed = data.manifest.extra
    return {
        "beta": settings.beta,
        "desirable_weight": settings.desirable_weight or float(computed.get("desirable_weight", 1.0)),
        "undesirable_weight": settings.undesirable_weight or float(computed.get("undesirable_weight", 1.0)),
        # TRL pairs each row with the one before it when the rows are prepared; another order would undo the pairs.
        "train_sampling_strategy": "sequential",
    }


KTO = Objective(
    name="kto",
    made_by="format kto",
    trainer_name="KTOTrainer",
    settings=TrainKtoSettings,
    sequences=(Sequence(("prompt_ids", "completion_ids"), "completion_mask"),),
    more_columns=("label",),
    defaults=Defaults(
        lora_rate=5e-6,
        full_rate=1e-6,
        rate_source="TRL: 5e-7 to 5e-6",
        epochs=1.0,
        epochs_source="TRL's example script",
        least_batch=16,
        most_batch=128,
        batch_source="KTO, arXiv:2402.01306: 16 to 128",
    ),
    config=_config,
    trainer=_trainer,
    options=_options,
    least_micro=4,
    free_micro=False,
    losses=("kto", "apo_zero_unpaired"),
    own_options={
        "beta": "beta",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    },
    fixed_options=("train_sampling_strategy",),
)
