"""Rules about the loss: not a number, rising, flat, too high at the start, falling in training alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from gymtrl.doctor.data import FEW_LOSS_TOKENS
from gymtrl.doctor.rule import AFTER, ENOUGH_STEPS, LIVE, Rule, usual_rate
from gymtrl.doctor.run import RunRecord, number
from gymtrl.doctor.trend import Trend, above, trend

RISE = 0.1
SURE = 5.0
"""Standard deviations by which a single step is not above the others by chance."""

ABOVE_START = 0.95
"""Share of the later steps that are above the first one, where it was no batch of another kind (ours)."""

FLAT = 0.01
VISIBLE = 0.05
LEARNED = 0.1
CHANCE = 0.9
FOREIGN_FACTOR, FOREIGN_NATS = 2.0, 1.0
OVERFIT = 0.05
RATE_FACTOR = 10.0
SHORT_RUN = ENOUGH_STEPS
OVERFLOWS = 10
"""Steps in a row whose gradient may overflow: in half precision, 65,536 is halved for each until it fits."""

FROZEN = 0.5
FEW_TARGETS = 0.6

_TRAINED = ("sft", "dpo", "kto")


def _nan(run: RunRecord) -> str | None:
    overflows = 0
    for entry in run.steps:
        loss, gradient = number(entry.get("loss")), number(entry.get("grad_norm"))
        if loss is not None and not math.isfinite(loss):
            return f"loss is {loss} in step {entry.get('step')}"
        overflows = overflows + 1 if gradient is not None and not math.isfinite(gradient) else 0
        if overflows >= OVERFLOWS:
            return f"grad_norm is {gradient} in step {entry.get('step')}, as in the {OVERFLOWS - 1} before"
    return None


def _diverging(run: RunRecord) -> str | None:
    losses = run.series("loss")
    whole = trend(losses)
    if whole is None:
        return None
    # With too high a rate the loss jumps in the second step already, and may come down from there.
    third = len(losses) // 3
    by_thirds = whole.change > max(whole.margin, RISE * abs(whole.first)) and above(losses[-third:], losses[:third])
    from_start = whole.last - losses[0] > max(SURE * whole.noise, whole.margin, RISE * abs(losses[0]))
    from_start &= sum(loss > losses[0] for loss in losses[1:]) >= ABOVE_START * (len(losses) - 1)
    if not by_thirds and not from_start:
        return None
    return (
        f"loss {losses[0]:.4g} in the first step, {whole.first:.4g} in the first third, {whole.last:.4g} in the last"
        + _rate_told(run)
    )


def _rate_told(run: RunRecord) -> str:
    return "" if run.learning_rate is None else f"; learning rate {run.learning_rate:g}, usual {usual_rate(run):g}"


def _flat(run: RunRecord) -> Trend | None:
    """How the loss went, where it is certain that it did not fall though there was something to learn."""
    whole = trend(run.series("loss"))
    gradients = run.series("grad_norm")
    if whole is None or whole.first < LEARNED or (gradients and not any(gradients)):
        return None
    falls = -whole.change > max(whole.margin, FLAT * whole.first)
    # In batches that differ much a fall that matters could hide.
    hidden = whole.margin - whole.change > VISIBLE * whole.first
    evaluations = run_evals(run)
    generalises = len(evaluations) > 1 and evaluations[-1][1] < (1 - FLAT) * evaluations[0][1]
    return None if hidden or falls or generalises or _diverging(run) else whole


def run_evals(run: RunRecord) -> list[tuple[int, float]]:
    """Steps and validation losses, in order."""
    found = ((entry.get("step"), number(entry.get("eval_loss"))) for entry in run.evals)
    return [(int(step), loss) for step, loss in found if step is not None and loss is not None and math.isfinite(loss)]


def _masked(run: RunRecord) -> str | None:
    facts = run.data
    if facts is None or facts.loss_tokens >= FEW_LOSS_TOKENS * facts.tokens:
        return None
    return f"{facts.loss_tokens:,} of {facts.tokens:,} tokens carry loss"


def _rate_low(run: RunRecord) -> str | None:
    low = run.learning_rate is not None and run.learning_rate < usual_rate(run) / RATE_FACTOR
    return f"learning rate {run.learning_rate:g}, usual {usual_rate(run):g}" if low else None


def _rate_high(run: RunRecord) -> str | None:
    high = run.learning_rate is not None and run.learning_rate > usual_rate(run) * RATE_FACTOR
    return f"learning rate {run.learning_rate:g}, usual {usual_rate(run):g}" if high else None


def _few_targets(run: RunRecord) -> str | None:
    if run.method == "full" or run.adapted is None or not run.linear or run.adapted >= FEW_TARGETS * run.linear:
        return None
    return f"{run.adapted} of {run.linear} linear layers have an adapter"


def _frozen(run: RunRecord) -> str | None:
    if run.method != "full" or run.trainable is None or not run.parameters:
        return None
    part = run.trainable / run.parameters
    return f"{run.trainable:,} of {run.parameters:,} weights are trained ({part:.0%})" if part < FROZEN else None


def _short(run: RunRecord) -> str | None:
    return f"{len(run.steps)} steps" if len(run.steps) < SHORT_RUN else None


def _other(run: RunRecord) -> str | None:
    return f"{len(run.steps)} steps{_rate_told(run)}"


_CAUSES = (_masked, _rate_low, _rate_high, _few_targets, _frozen, _short, _other)
"""Why a loss stays flat, the most telling first: a run gets the first one that its numbers show."""


def _flat_because(cause: Callable[[RunRecord], str | None]) -> Callable[[RunRecord], str | None]:
    def check(run: RunRecord) -> str | None:
        whole = _flat(run)
        if whole is None or any(earlier(run) for earlier in _CAUSES[: _CAUSES.index(cause)]):
            return None
        why = cause(run)
        return why and f"loss {whole.first:.4g} in the first third, {whole.last:.4g} in the last; {why}"

    return check


def _at_chance(run: RunRecord) -> str | None:
    losses = run.series("loss")
    if not losses or not run.vocabulary or losses[0] <= CHANCE * math.log(run.vocabulary):
        return None
    guess = math.log(run.vocabulary)
    return f"loss {losses[0]:.4g} in the first step; guessing among {run.vocabulary:,} tokens gives {guess:.4g}"


def _foreign(run: RunRecord) -> str | None:
    losses, entropies = run.series("loss"), run.series("entropy")
    if not losses or not entropies or _at_chance(run):
        return None
    if losses[0] <= FOREIGN_FACTOR * entropies[0] + FOREIGN_NATS:
        return None
    return f"loss {losses[0]:.4g} in the first step, where the model's own uncertainty (entropy) is {entropies[0]:.4g}"


def _overfit(run: RunRecord) -> str | None:
    evaluations, losses = run_evals(run), run.series("loss")
    if len(evaluations) < 2 or len(losses) < 2:
        return None
    best_step, best = min(evaluations, key=lambda pair: pair[1])
    step, last = evaluations[-1]
    tenth = max(1, len(losses) // 10)
    before, after = median(losses[:tenth]), median(losses[-tenth:])
    if last <= (1 + OVERFIT) * best or after >= before:
        return None
    return (
        f"validation loss {best:.4g} at step {best_step}, {last:.4g} at step {step}; "
        f"training loss fell from {before:.4g} to {after:.4g}"
    )


def _flat_rule(code: str, cause: Callable[[RunRecord], str | None], words: str, remedy: str, source: str) -> Rule:
    title = "The loss does not fall"
    return Rule(code, AFTER, _TRAINED, "warning", title, words, remedy, source, _flat_because(cause))


_FLAT_SOURCE = f"ours: no fall beyond three standard errors where {VISIBLE:.0%} would show; "

LOSS_RULES = (
    Rule(
        "loss_nan",
        LIVE,
        ("sft", "dpo", "kto", "grpo"),
        "error",
        "The loss or its gradient is not a number",
        "Numbers overflowed: a learning rate that is far too high, half precision, or damaged weights.",
        "Start again with --learning-rate {rate} or less; if it stays, check that the base model answers at all",
        "certain",
        _nan,
        stops=True,
    ),
    Rule(
        "loss_diverging",
        LIVE,
        _TRAINED,
        "error",
        "The loss rises",
        "The learning rate is too high for this model and batch.",
        "Start again with a third of the learning rate; --learning-rate {rate} is usual",
        f"ours: by {RISE:.0%}, and beyond three standard errors",
        _diverging,
    ),
    _flat_rule(
        "flat_few_loss_tokens",
        _masked,
        "All or nearly all tokens are masked out of the loss.",
        "Make the dataset again with 'gymtrl format {objective}', and look at its mask with --show 3",
        _FLAT_SOURCE + f"below {FEW_LOSS_TOKENS:.0%} of the tokens",
    ),
    _flat_rule(
        "flat_rate_low",
        _rate_low,
        "The learning rate is too low.",
        "Train with 'gymtrl train {objective} {dataset} --learning-rate {rate}'",
        _FLAT_SOURCE + f"{RATE_FACTOR:g} times below the default of train",
    ),
    _flat_rule(
        "flat_rate_high",
        _rate_high,
        "The learning rate is so high that steps undo each other.",
        "Train with 'gymtrl train {objective} {dataset} --learning-rate {rate}'",
        _FLAT_SOURCE + f"{RATE_FACTOR:g} times above the default of train",
    ),
    _flat_rule(
        "flat_few_targets",
        _few_targets,
        "The adapter sits on few of the layers; attention alone learns less (LoRA Without Regret).",
        "Leave out peft.target_modules, which puts an adapter on every linear layer",
        _FLAT_SOURCE + f"below {FEW_TARGETS:.0%} of the linear layers",
    ),
    _flat_rule(
        "flat_frozen",
        _frozen,
        "Most weights of a full training are frozen.",
        "Train a model none of whose weights are frozen, or an adapter on it with --method lora",
        _FLAT_SOURCE + f"below {FROZEN:.0%} of the weights",
    ),
    _flat_rule(
        "flat_short_run",
        _short,
        "Too few optimizer steps.",
        "Train {longer}",
        _FLAT_SOURCE + f"below {SHORT_RUN} steps",
    ),
    _flat_rule(
        "flat",
        _other,
        "The rows hold nothing that the model does not know, or nothing that it can learn.",
        "Look at some rows with 'gymtrl format {objective} ... --show 3'; if they are right, try three times the "
        "learning rate",
        _FLAT_SOURCE + "no other cause shows",
    ),
    Rule(
        "loss_at_chance",
        LIVE,
        ("sft",),
        "warning",
        "The model predicts no better than chance",
        "The weights are not those of a trained model, or the tokens are not those of its tokenizer.",
        "Check that the base model's folder is whole and answers; make the dataset again with --model set to it",
        f"ours: first loss above {CHANCE:.0%} of ln(vocabulary)",
        _at_chance,
    ),
    Rule(
        "loss_foreign",
        LIVE,
        ("sft",),
        "warning",
        "The text is foreign to the model",
        "Another chat template than the model's own, or another model's rollouts. Of text that a model wrote itself, "
        "loss and entropy are about equal.",
        "Compare a row with 'gymtrl format sft ... --show 1' to what the model writes; collect with the model that is "
        "trained",
        f"ours: first loss above {FOREIGN_FACTOR:g} times the entropy and {FOREIGN_NATS:g} more",
        _foreign,
    ),
    Rule(
        "overfitting",
        LIVE,
        _TRAINED,
        "warning",
        "The validation loss rises while the training loss falls",
        "The model learns the rows by heart: too many passes over too little data.",
        "Train with fewer --epochs, a lower --learning-rate or a smaller --lora-r, or collect more tasks",
        f"ours: {OVERFIT:.0%} above its best",
        _overfit,
    ),
)
