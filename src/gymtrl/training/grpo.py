"""GRPO on recorded groups, with TRL's `GRPOTrainer`; experimental.

Run as: gymtrl train grpo DATASET -o RUN
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gymtrl.training.data import Sequence, TrainingData
from gymtrl.training.objective import Defaults, Objective, Parts
from gymtrl.training.settings import TrainGrpoSettings

if TYPE_CHECKING:
    from transformers import Trainer


def _config() -> type[Any]:
    from gymtrl.training.replay import RecordedGroupConfig

    return RecordedGroupConfig


def _trainer(parts: Parts) -> Trainer:
    from gymtrl.training.groups import recompute_log_probs
    from gymtrl.training.replay import RecordedGroupTrainer

    args = parts.args
    rows = recompute_log_probs(
        parts.model, parts.train, temperature=args.temperature, trust_remote_code=args.trust_remote_code
    )
    return RecordedGroupTrainer(**parts.arguments() | {"train_dataset": rows})


def _options(settings: TrainGrpoSettings, data: TrainingData) -> dict[str, Any]:
    return {
        "loss_type": settings.loss_type,
        "baseline_shift": settings.baseline_shift,
        "temperature": settings.temperature,
        "stop_ratio": settings.stop_ratio,
        "stop_kl": settings.stop_kl,
    }


GRPO = Objective(
    name="grpo",
    made_by="format grpo",
    trainer_name="GRPOTrainer",
    settings=TrainGrpoSettings,
    sequences=(Sequence(("prompt_ids", "completion_ids"), "completion_mask"),),
    offloads=False,
    evaluates=False,  # recorded rollouts tell little of what a policy that has moved on would do
    more_columns=("log_probs", "reward", "group"),
    defaults=Defaults(
        lora_rate=5e-6,
        full_rate=5e-7,
        rate_source="ours: half of what TRL takes for online GRPO",
        epochs=1.0,
        epochs_source="ours: what was recorded is off-policy after the first step",
        least_batch=8,
        most_batch=64,
        batch_source="OLMo 3: groups of 8; ours: small data still gets its steps",
    ),
    config=_config,
    trainer=_trainer,
    options=_options,
    own_options={name: name for name in ("loss_type", "baseline_shift", "temperature", "stop_ratio", "stop_kl")},
)
