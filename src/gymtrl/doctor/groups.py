"""Rules about GRPO."""

from __future__ import annotations

from statistics import fmean

from gymtrl.doctor.gradients import FEWEST, ZERO
from gymtrl.doctor.rule import LIVE, PREFLIGHT, Rule
from gymtrl.doctor.run import RunRecord

ALIKE = 0.5
LOWEST_RATIO = 0.1
HIGHEST_KL = 0.5

_BETWEEN = (
    "Collect tasks that the policy solves now and then: easier ones where it never does, harder ones where it always "
    "does, and more repeats of each"
)


def _all_alike(run: RunRecord) -> str | None:
    if run.data is None or not run.data.groups or run.data.groups_alike < run.data.groups:
        return None
    return f"in all {run.data.groups:,} groups the rewards are all the same"


def _alike(run: RunRecord) -> str | None:
    facts = run.data
    if facts is None or facts.groups_alike == facts.groups:
        return None
    if facts.groups_alike > ALIKE * facts.groups:
        return f"{facts.groups_alike:,} of {facts.groups:,} groups"
    left_out = facts.dropped.get("no_variance", 0)
    if left_out <= ALIKE * facts.read:
        return None
    return f"{left_out:,} of {facts.read:,} rollouts were left out of the dataset for it (no_variance)"


def _masked(run: RunRecord) -> str | None:
    # The first steps always have a gradient: there the policy is the one that was recorded.
    gradients, clipped = run.series("grad_norm")[-FEWEST:], run.series("clip_ratio/region_mean")[-FEWEST:]
    if len(gradients) < FEWEST or max(gradients) > ZERO:
        return None
    told = f"grad_norm {max(gradients):.2g} at most in the last {FEWEST} steps"
    return told + (f"; clip_ratio/region_mean {fmean(clipped):.3g}" if clipped else "")


def _negative_ratio(run: RunRecord) -> str | None:
    ratios, lowest = run.series("ratio/negatives"), run.stop_ratio or LOWEST_RATIO
    if not ratios or ratios[-1] >= lowest:
        return None
    return (
        f"mean ratio on negatives {ratios[0]:.3g} in the first step, {ratios[-1]:.3g} in step {len(run.steps)}, below "
        f"{lowest:g}"
    )


def _kl(run: RunRecord) -> str | None:
    values, highest = run.series("kl"), run.stop_kl or HIGHEST_KL
    if not values or values[-1] <= highest:
        return None
    return f"KL {values[0]:.3g} a token in the first step, {values[-1]:.3g} in step {len(run.steps)}, above {highest:g}"


GROUP_RULES = (
    Rule(
        "groups_all_alike",
        PREFLIGHT,
        ("grpo",),
        "error",
        "No group has rewards that differ",
        "Each task is solved always or never, so that no rollout is better than its group.",
        _BETWEEN,
        "certain",
        _all_alike,
    ),
    Rule(
        "groups_alike",
        PREFLIGHT,
        ("grpo",),
        "warning",
        "Most groups have rewards that are all the same",
        "The tasks are too easy or too hard for the policy; such groups have no gradient.",
        _BETWEEN,
        f"ours: above {ALIKE:.0%}; DAPO (arXiv:2503.14476) leaves such groups out",
        _alike,
    ),
    Rule(
        "ratios_masked",
        LIVE,
        ("grpo",),
        "error",
        "No gradient reaches the weights",
        "All importance ratios are clipped: the policy is as far from the recorded one as the loss lets it go.",
        "Nothing more can be learned from these rollouts: collect again with the policy that is trained, or train with "
        "a lower --learning-rate or --loss-type topr, which clips no good rollout",
        f"ours: the last {FEWEST} steps, none above {ZERO:g}",
        _masked,
        stops=True,
    ),
    Rule(
        "negatives_vanish",
        LIVE,
        ("grpo",),
        "warning",
        "Bad rollouts have become all but impossible",
        "The policy was pushed away from them for too long, and collapses from here on.",
        "Collect again with the new policy; where the run is to go on longer with these rollouts, train with a lower "
        "--learning-rate; {rate} is usual",
        f"ours, after TOPR (arXiv:2503.14286): mean ratio below --stop-ratio, or {LOWEST_RATIO:g} where it is 0",
        _negative_ratio,
    ),
    Rule(
        "kl_high",
        LIVE,
        ("grpo",),
        "warning",
        "The policy has left the one that was recorded",
        "Recorded rollouts say nothing about a policy this far away.",
        "Collect again with the new policy; where the run is to go on longer with these rollouts, train with a lower "
        "--learning-rate; {rate} is usual",
        "ours: KL a token above --stop-kl",
        _kl,
    ),
)
