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

ENOUGH_STEPS = 50
MOST_EPOCHS = 5
"""Passes over the data that are still worth naming as a remedy (ours)."""


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
        remedy (`str`): What to do; `{objective}`, `{dataset}`, `{rate}` (the usual learning rate) and `{longer}`
            (how to come to 50 steps) stand for the run's own.
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
    return {
        "objective": record.objective,
        "dataset": record.dataset,
        "rate": f"{usual_rate(record):g}",
        "longer": _longer(record),
    }


def _longer(record: RunRecord) -> str:
    """How a run comes to 50 steps."""
    rows, batch = record.data.rows if record.data else 0, record.effective_batch or 0
    if not rows or not batch:
        return "with more --epochs or a smaller --effective-batch"
    if record.planned_steps is not None and record.planned_steps < rows // batch:
        return "without --max-steps, which ends the run within the first pass over the data"
    epochs = ENOUGH_STEPS * batch / rows
    if epochs <= MOST_EPOCHS:
        return f"with --epochs {max(1, round(epochs))}, or with a smaller --effective-batch"
    return f"with a smaller --effective-batch, or on more rollouts: {rows:,} rows in more passes are learned by heart"


PREFLIGHT: frozenset[Moment] = frozenset({"preflight", "after"})
"""Rules about what is known beforehand; they hold afterwards, too."""
LIVE: frozenset[Moment] = frozenset({"live", "after"})
AFTER: frozenset[Moment] = frozenset({"after"})
