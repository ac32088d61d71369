"""Rules about DPO and KTO."""

from __future__ import annotations

from statistics import fmean

from gymtrl.doctor.rule import LIVE, PREFLIGHT, Rule
from gymtrl.doctor.run import RunRecord
from gymtrl.doctor.trend import FEWEST, trend

FALL = 0.1
EARLY = 0.25
ACCURATE = 0.95
FEWEST_PAIRS = 20
BALANCE = (1.0, 4 / 3)


def _pairs_identical(run: RunRecord) -> str | None:
    if run.data is None or not run.data.rows or run.data.identical_pairs < run.data.rows:
        return None
    return f"all {run.data.rows:,} pairs have the same tokens on both sides"


def _some_pairs_identical(run: RunRecord) -> str | None:
    if run.data is None or not 0 < run.data.identical_pairs < run.data.rows:
        return None
    return f"{run.data.identical_pairs:,} of {run.data.rows:,} pairs have the same tokens on both sides"


def _chosen_falls(run: RunRecord) -> str | None:
    chosen, margins = trend(run.series("rewards/chosen")), trend(run.series("rewards/margins"))
    if chosen is None or margins is None or margins.change <= margins.margin:
        return None
    # Rewards are beta times the change since the reference model, and compare the same rows with themselves: they show
    # a fall long before the log-probabilities do, which differ from batch to batch.
    if chosen.change >= -chosen.margin or chosen.last >= -FALL * margins.last:
        return None
    return (
        f"rewards/chosen {chosen.first:.3g} in the first third, {chosen.last:.3g} in the last, while rewards/margins "
        f"rose from {margins.first:.3g} to {margins.last:.3g}"
    )


def _accurate_early(run: RunRecord) -> str | None:
    accuracies = run.series("rewards/accuracies")
    planned = run.planned_steps or len(run.steps)
    # In the first step policy and reference are the same, and nothing is preferred.
    early = accuracies[1 : max(1, int(EARLY * planned))]
    if len(run.steps) < FEWEST or len(early) * (run.effective_batch or 1) < FEWEST_PAIRS or fmean(early) <= ACCURATE:
        return None
    return f"{fmean(early):.1%} of the pairs are told apart in steps 2 to {len(early) + 1} of {planned}"


def _one_label(run: RunRecord) -> str | None:
    if run.data is None or not run.data.rows or min(run.data.good, run.data.bad):
        return None
    return f"{run.data.good:,} good and {run.data.bad:,} bad rows"


def _weights(run: RunRecord) -> str | None:
    facts = run.data
    if facts is None or not min(facts.good, facts.bad):
        return None
    desirable = run.desirable_weight if run.desirable_weight is not None else facts.desirable_weight
    undesirable = run.undesirable_weight if run.undesirable_weight is not None else facts.undesirable_weight
    ratio = desirable * facts.good / (undesirable * facts.bad) if undesirable else float("inf")
    # Weights are written with few digits.
    if BALANCE[0] * 0.99 <= ratio <= BALANCE[1] * 1.01:
        return None
    return (
        f"{facts.good:,} good rows of weight {desirable:g} against {facts.bad:,} bad ones of weight {undesirable:g}: "
        f"{ratio:.3g} to 1"
    )


PREFERENCE_RULES = (
    Rule(
        "pairs_identical",
        PREFLIGHT,
        ("dpo",),
        "error",
        "The two sides of every pair are the same",
        "The pairs were made of copies; of two equal sides none is better, and only the sft part of the loss learns.",
        "Make the pairs again with 'gymtrl format dpo'",
        "certain",
        _pairs_identical,
    ),
    Rule(
        "some_pairs_identical",
        PREFLIGHT,
        ("dpo",),
        "warning",
        "Some pairs have two sides that are the same",
        "The pairs were made of copies; of two equal sides none is better, and only the sft part of the loss learns.",
        "Make the pairs again with 'gymtrl format dpo', which leaves such pairs out",
        "certain",
        _some_pairs_identical,
    ),
    Rule(
        "chosen_falls",
        LIVE,
        ("dpo",),
        "warning",
        "The chosen answers become less likely",
        "The margin grows because the rejected side falls faster; the policy moves to answers that are in no pair "
        "(arXiv:2404.19733).",
        "Train with a lower --learning-rate or a higher --beta; the loss should have its sft part, as it does by "
        "default, and may have more of it: --loss-weights 1 --loss-weights 2",
        f"arXiv:2404.19733; ours: by {FALL:.0%} of the margin, and beyond three standard errors",
        _chosen_falls,
    ),
    Rule(
        "accurate_early",
        LIVE,
        ("dpo",),
        "warning",
        "Good and bad are told apart almost at once",
        "Something plain, such as length, form or a phrase, divides the sides; or the learning rate is too high.",
        "Look at some pairs with 'gymtrl format dpo ... --show 3', and lower the learning rate; {rate} is usual",
        f"arXiv:2404.19733; ours: accuracy above {ACCURATE:g} in the first {EARLY:.0%} of the steps",
        _accurate_early,
    ),
    Rule(
        "one_label",
        PREFLIGHT,
        ("kto",),
        "error",
        "All rows have the same label",
        "The threshold puts every rollout on one side; KTO sets good against bad.",
        "Format again with another --reward-threshold, or train on the good ones with 'gymtrl train sft'",
        "certain",
        _one_label,
    ),
    Rule(
        "weights_unbalanced",
        PREFLIGHT,
        ("kto",),
        "warning",
        "Good and bad rows are weighed unequally",
        "One side is far larger than the other, and the weights do not make up for it.",
        "Leave out --desirable-weight and --undesirable-weight: they are computed from the data",
        "arXiv:2402.01306, equation 8: 1 to 4/3 as much for the good",
        _weights,
    ),
)
