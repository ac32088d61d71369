"""A run as plain numbers: all that the rules look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """The training rows of a dataset, counted. What a kind of dataset does not have is 0.

    Attributes:
        rows (`int`): Rows.
        tokens, loss_tokens (`int`): Tokens of all sequences, and those of them that carry loss.
        longest (`int`): Tokens of the longest sequence.
        duplicates (`int`): Rows whose tokens stand in an earlier row already.
        tasks (`int`): Tasks that the rows come from.
        read (`int`): Lines that the dataset was made of.
        dropped (`dict[str, int]`): Those that stand behind no row, by reason.
        identical_pairs (`int`): Pairs whose sides have the same tokens.
        good, bad (`int`): Good and bad rows (KTO).
        good_length, bad_length (`float`): Median tokens that carry loss, of the good and of the bad side or rows.
        longer_share (`float`): Share of pairs whose good side is the longer one; of groups with differing rewards the
            share whose better rollouts are, on average.
        groups, groups_alike (`int`): Groups, and those whose rewards are all the same.
        desirable_weight, undesirable_weight (`float`): Weights that the dataset was made with (KTO).
    """

    rows: int
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    duplicates: int = 0
    tasks: int = 0
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    identical_pairs: int = 0
    good: int = 0
    bad: int = 0
    good_length: float = 0.0
    bad_length: float = 0.0
    longer_share: float = 0.0
    groups: int = 0
    groups_alike: int = 0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run at some moment. What is not known is `None`, and no rule that needs it says anything.

    Attributes:
        objective (`str`): `sft`, `dpo`, `kto` or `grpo`.
        method (`str`): `lora`, `qlora` or `full`.
        dataset (`str`): The dataset folder, as commands name it.
        data (`DataFacts`, *optional*): Of its training rows.
        planned_steps (`int`, *optional*): Optimizer steps of the whole run.
        effective_batch (`int`, *optional*): Rows a step.
        learning_rate (`float`, *optional*): Peak.
        desirable_weight, undesirable_weight (`float`, *optional*): Where other weights than the dataset's are set.
        stop_ratio, stop_kl (`float`, *optional*): Where training on recorded groups stops.
        vocabulary (`int`, *optional*): Tokens that the model knows.
        trainable, parameters (`int`, *optional*): Weights that are trained, and all.
        adapted, linear (`int`, *optional*): Linear layers with an adapter, and all but the head.
        steps (`tuple[Mapping[str, Any], ...]`): Entries of `metrics.jsonl` of training steps, in order.
        evals (`tuple[Mapping[str, Any], ...]`): Those of evaluations.
    """

    objective: str
    method: str = "lora"
    dataset: str = "DATASET"
    data: DataFacts | None = None
    planned_steps: int | None = None
    effective_batch: int | None = None
    learning_rate: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None
    stop_ratio: float | None = None
    stop_kl: float | None = None
    vocabulary: int | None = None
    trainable: int | None = None
    parameters: int | None = None
    adapted: int | None = None
    linear: int | None = None
    steps: tuple[Mapping[str, Any], ...] = ()
    evals: tuple[Mapping[str, Any], ...] = ()

    def series(self, name: str) -> list[float]:
        """The finite values of a metric over the training steps that have it."""
        values = (number(entry.get(name)) for entry in self.steps)
        return [value for value in values if value is not None and math.isfinite(value)]


def number(value: object) -> float | None:
    """A value of a log as a number; trainers write some as text. `None` where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
