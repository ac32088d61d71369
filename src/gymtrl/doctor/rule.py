"""What a rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gymtrl.doctor.finding import Finding, Severity
from gymtrl.doctor.run import RunRecord

Moment = Literal["preflight", "live", "after"]
MOMENTS: tuple[Moment, ...] = ("preflight", "live", "after")
OBJECTIVES = ("sft", "dpo", "kto", "grpo")

USUAL_RATE = {
    ("sft", "lora"): 2e-4,
    ("sft", "full"): 1e-5,
    ("dpo", "lora"): 5e-6,
    ("dpo", "full"): 1e-6,
    ("kto", "lora"): 5e-6,
    ("kto", "full"): 1e-6,
    ("grpo", "lora"): 5e-6,
    ("grpo", "full"): 5e-7,
}
"""Learning rates that work for most models: the defaults of `train`, whose sources stand there."""


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with a run.

    Attributes:
        code (`str`): Its name in findings.
        when (`frozenset[str]`): Before the model loads (`preflight`), in training (`live`), of a run that has ended
            (`after`).
        objectives (`tuple[str, ...]`): What it is about.
        severity (`str`): As in `Finding`.
        title (`str`): What is the matter.
        cause (`str`): The likely cause.
        remedy (`str`): What to do; `{objective}`, `{dataset}`, `{rate}` (the usual learning rate) and `{epochs}`
            (enough for 50 steps) stand for the run's own.
        source (`str`): Where its threshold comes from.
        check (`Callable[[RunRecord], str | None]`): What was seen, with numbers; `None` where all is well.
        stops (`bool`): Training on would be in vain or do harm.
    """

    code: str
    when: frozenset[Moment]
    objectives: tuple[str, ...]
    severity: Severity
    title: str
    cause: str
    remedy: str
    source: str
    check: Callable[[RunRecord], str | None]
    stops: bool = False

    def apply(self, record: RunRecord) -> Finding | None:
        """What the rule finds in a run."""
        evidence = self.check(record)
        if evidence is None:
            return None
        remedy = self.remedy.format_map(_words(record))
        return Finding(self.code, self.severity, self.title, evidence, self.cause, remedy)


def usual_rate(record: RunRecord) -> float:
    """The learning rate that works for most models."""
    return USUAL_RATE[record.objective, "full" if record.method == "full" else "lora"]


def _words(record: RunRecord) -> dict[str, str]:
    rows = record.data.rows if record.data else None
    epochs = 50 * record.effective_batch / rows if rows and record.effective_batch else None
    return {
        "objective": record.objective,
        "dataset": record.dataset,
        "rate": f"{usual_rate(record):g}",
        "epochs": "N" if epochs is None else f"{max(1, round(epochs))}",
    }


PREFLIGHT: frozenset[Moment] = frozenset({"preflight", "after"})
"""Rules about what is known beforehand; they hold afterwards, too."""
LIVE: frozenset[Moment] = frozenset({"live", "after"})
AFTER: frozenset[Moment] = frozenset({"after"})
