"""What an objective is to the code that trains: its data, its defaults, its trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gymtrl.training.data import Sequence, TrainingData
from gymtrl.training.settings import TrainSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

Name = Literal["sft", "dpo", "kto", "grpo"]


@dataclass(frozen=True)
class Defaults:
    """What an objective fills in where the settings say nothing.

    Attributes:
        lora_rate, full_rate (`float`): Peak learning rate of an adapter and of every weight.
        rate_source (`str`): Where they come from.
        epochs (`float`): Passes over data that is not large; see `LARGE_DATA`.
        epochs_source (`str`): Where that comes from.
        least_batch, most_batch (`int`): Bounds of the effective batch.
        batch_source (`str`): Where they come from.
    """

    lora_rate: float
    full_rate: float
    rate_source: str
    epochs: float
    epochs_source: str
    least_batch: int
    most_batch: int
    batch_source: str


@dataclass(frozen=True)
class Parts:
    """What every trainer is made of.

    Attributes:
        model (`Any`): The model: a name that the trainer loads, or a model with an adapter.
        args (`Config`): TRL's configuration.
        train (`Dataset`): Training rows, shuffled.
        validation (`Dataset`, *optional*): Validation rows.
        tokenizer (`Any`): Of the model.
        peft_config (`Any`): Of a new adapter, or `None`.
        quantization_config (`Any`): Of a model in 4 bits, or `None`.
        callbacks (`list[Any]`): Of the run.
    """

    model: Any
    args: Any
    train: Dataset
    validation: Dataset | None
    tokenizer: Any
    peft_config: Any
    quantization_config: Any
    callbacks: list[Any]

    def arguments(self) -> dict[str, Any]:
        """As TRL's trainers call them."""
        return {
            "model": self.model,
            "args": self.args,
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "processing_class": self.tokenizer,
            "peft_config": self.peft_config,
            "quantization_config": self.quantization_config,
            "callbacks": self.callbacks,
        }


@dataclass(frozen=True)
class Objective:
    """One way to learn from rollouts.

    Attributes:
        name (`str`): As the verbs call it.
        made_by (`str`): Verb that writes its datasets.
        trainer_name (`str`): TRL's trainer, for cards and reports.
        sequences (`tuple[Sequence, ...]`): What each row gives the model.
        more_columns (`tuple[str, ...]`): Further columns that training takes.
        defaults (`Defaults`): What is filled in.
        least_micro (`int`): Fewest rows at once; TRL's KTO pairs rows within a micro-batch.
        free_micro (`bool`): The loss does not depend on how an effective batch is divided.
        offloads (`bool`): TRL's trainer can let activations wait in main memory.
        evaluates (`bool`): A loss on validation rows tells something.
        config (`Callable`): Returns TRL's configuration class.
        trainer (`Callable`): Makes the trainer of its parts.
        settings (`type[TrainSettings]`): Of the verb.
        options (`Callable`): TRL's options that follow from the settings and the data.
        own_options (`dict[str, str]`): TRL's options that have a setting of their own, by that setting.
        losses (`tuple[str, ...]`): TRL's losses, where only the trainer would refuse another.
        fixed_options (`tuple[str, ...]`): TRL's options that correctness depends on, beside those of all objectives.
    """

    name: Name
    made_by: str
    trainer_name: str
    settings: type[TrainSettings]
    sequences: tuple[Sequence, ...]
    defaults: Defaults
    config: Callable[[], type[Any]]
    trainer: Callable[[Parts], Trainer]
    options: Callable[[Any, TrainingData], dict[str, Any]]
    more_columns: tuple[str, ...] = ()
    least_micro: int = 1
    free_micro: bool = True
    offloads: bool = True
    evaluates: bool = True
    losses: tuple[str, ...] = ()
    own_options: dict[str, str] = field(default_factory=dict)
    fixed_options: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Columns that training takes."""
        return list(dict.fromkeys([c for s in self.sequences for c in s.columns] + list(self.more_columns)))


def no_options(settings: TrainSettings, data: TrainingData) -> dict[str, Any]:
    """For an objective whose settings are those of all."""
    return {}
