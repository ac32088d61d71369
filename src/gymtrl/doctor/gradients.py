"""Rules about what moves the weights: gradients, trainable weights, and entropy."""

from __future__ import annotations

from statistics import median

from gymtrl.doctor.rule import LIVE, OBJECTIVES, Rule
from gymtrl.doctor.run import RunRecord, number
from gymtrl.doctor.trend import trend

FEWEST = 5
ZERO = 1e-6
SPIKE = 10.0
SPIKE_NORM = 1.0
WINDOW = 20
COLLAPSED_SHARE, COLLAPSED_NATS = 0.2, 0.1


def _nothing_trainable(run: RunRecord) -> str | None:
    if run.trainable is None or run.trainable > 0:
        return None
    return f"0 of {run.parameters:,} weights are trained" if run.parameters else "0 weights are trained"


def no_gradient(run: RunRecord) -> str | None:
    """Gradients that are 0 in all steps, five or more."""
    gradients = run.series("grad_norm")
    if len(gradients) < FEWEST or max(gradients) > ZERO:
        return None
    return f"grad_norm {max(gradients):.2g} at most in {len(gradients)} steps"


def _spikes(run: RunRecord) -> str | None:
    found = []
    before: list[float] = []
    for entry in run.steps:
        value = number(entry.get("grad_norm"))
        if value is None:
            continue
        if len(before) >= FEWEST and value > max(SPIKE_NORM, SPIKE * median(before[-WINDOW:])):
            found.append((value, entry.get("step"), median(before[-WINDOW:])))
        before.append(value)
    if not found:
        return None
    value, step, usual = max(found, key=lambda spike: spike[0])
    return f"grad_norm {value:.3g} in step {step}, {usual:.3g} in the steps before; {len(found)} such steps"


def _entropy_collapse(run: RunRecord) -> str | None:
    whole = trend(run.series("entropy"))
    if whole is None or whole.last >= min(COLLAPSED_SHARE * whole.first, COLLAPSED_NATS):
        return None
    return f"entropy {whole.first:.3g} in the first third, {whole.last:.3g} in the last"


GRADIENT_RULES = (
    Rule(
        "nothing_trainable",
        LIVE,
        OBJECTIVES,
        "error",
        "No weight is trained",
        "All weights are frozen, or the adapter has none.",
        "Leave out peft.target_modules and what freezes weights, or train with --method full",
        "certain",
        _nothing_trainable,
        stops=True,
    ),
    Rule(
        "no_gradient",
        LIVE,
        ("sft", "dpo", "kto"),
        "error",
        "No gradient reaches the weights",
        "The trained weights have no influence on the loss, or both sides of every pair are the same.",
        "Leave out peft.target_modules, or train with --method full; look at the data with "
        "'gymtrl format {objective} ... --show 3'",
        f"ours: {FEWEST} steps, none above {ZERO:g}",
        no_gradient,
        stops=True,
    ),
    Rule(
        "gradient_spikes",
        LIVE,
        OBJECTIVES,
        "warning",
        "Some steps have gradients far above the others",
        "Single rows that are unlike the rest, such as garbled or very short ones, or a learning rate near its limit.",
        "Look at the shortest and the longest rows with 'gymtrl format {objective} ... --show 3'; a larger "
        "--effective-batch or half the learning rate softens them",
        f"ours: {SPIKE:g} times the median of the {WINDOW} steps before, and above TRL's max_grad_norm "
        f"({SPIKE_NORM:g})",
        _spikes,
    ),
    Rule(
        "entropy_collapse",
        LIVE,
        OBJECTIVES,
        "warning",
        "The policy has become certain of everything",
        "Too many passes or too high a learning rate; such a policy gives one answer only, and later rounds have "
        "nothing to choose from.",
        "Stop earlier with --max-steps, train with fewer --epochs or a lower --learning-rate",
        f"ours: entropy below {COLLAPSED_NATS:g} and below {COLLAPSED_SHARE:.0%} of what it was",
        _entropy_collapse,
    ),
)
