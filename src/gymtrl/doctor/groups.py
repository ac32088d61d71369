"""Rules about GRPO."""

from __future__ import annotations

from statistics import fmean

from gymtrl.doctor.gradients import FEWEST, no_gradient
from gymtrl.doctor.rule import LIVE, PREFLIGHT, Rule
from gymtrl.doctor.run import RunRecord

ALIKE = 0.5
LOWEST_RATIO = 0.1
HIGHEST_KL = 0.5

# What the trainer of recorded groups logs, over all rows of an optimizer step.
NEGATIVE_RATIO = "ratio/negatives"
KL = "kl"


def _all_alike(run: RunRecord) -> str | None:
    if run.data is None or not run.data.groups or run.data.groups_alike < run.data.groups:
        return None
    return f"in all {run.data.groups:,} groups the rewards are all the same"


def _alike(run: RunRecord) -> str | None:
    shares = run.series("frac_reward_zero_std")
    if len(shares) >= FEWEST:
        return f"{fmean(shares):.0%} of the groups in {len(shares)} steps" if fmean(shares) > ALIKE else None
    if run.data is None or not ALIKE * run.data.groups < run.data.groups_alike < run.data.groups:
        return None
    return f"{run.data.groups_alike:,} of {run.data.groups:,} groups"


def _masked(run: RunRecord) -> str | None:
    shares = run.series("frac_reward_zero_std")
    if shares and fmean(shares) == 1:
        return None
    told = no_gradient(run)
    clipped = run.series("clip_ratio/region_mean")
    return told and told + (f"; clip_ratio/region_mean {fmean(clipped):.3g}" if clipped else "")


def _negative_ratio(run: RunRecord) -> str | None:
    ratios = run.series(NEGATIVE_RATIO)
    if not ratios or ratios[-1] >= LOWEST_RATIO:
        return None
    return f"mean ratio on negatives {ratios[0]:.3g} in the first step, {ratios[-1]:.3g} in the last"


def _kl(run: RunRecord) -> str | None:
    values = run.series(KL)
    if not values or values[-1] <= HIGHEST_KL:
        return None
    return f"KL {values[0]:.3g} a token in the first step, {values[-1]:.3g} in the last"


GROUP_RULES = (
    Rule(
        "groups_all_alike",
        PREFLIGHT,
        ("grpo",),
        "error",
        "No group has rewards that differ",
        "Each task is solved always or never, so that no rollout is better than its group.",
        "Collect tasks that the policy solves now and then: 'gymtrl format grpo --kind prompts' finds them",
        "certain",
        _all_alike,
    ),
    Rule(
        "groups_alike",
        PREFLIGHT | LIVE,
        ("grpo",),
        "warning",
        "Most groups have rewards that are all the same",
        "The tasks are too easy or too hard for the policy; such groups have no gradient.",
        "Collect tasks that the policy solves now and then: 'gymtrl format grpo --kind prompts' finds them",
        f"ours: above {ALIKE:.0%}; DAPO (arXiv:2503.14476) leaves such groups out",
        _alike,
    ),
    Rule(
        "ratios_masked",
        LIVE,
        ("grpo",),
        "error",
        "No gradient reaches the weights",
        "All importance ratios are clipped or masked: the policy is far from the one that was recorded, or recorded "
        "log-probabilities were taken at another temperature.",
        "Collect again with the model that is trained, at temperature 1; or leave out the recorded log-probabilities",
        f"ours: {FEWEST} steps",
        _masked,
        stops=True,
    ),
    Rule(
        "negatives_vanish",
        LIVE,
        ("grpo",),
        "error",
        "Bad rollouts have become all but impossible",
        "The policy was pushed away from them for too long; from here on it collapses.",
        "Train with fewer steps (--max-steps) or a lower --learning-rate; {rate} is usual",
        f"ours, after TOPR (arXiv:2503.14286): mean ratio below {LOWEST_RATIO:g}",
        _negative_ratio,
    ),
    Rule(
        "kl_high",
        LIVE,
        ("grpo",),
        "error",
        "The policy has left the one that was recorded",
        "Recorded rollouts say nothing about a policy this far away.",
        "Train with fewer steps (--max-steps) or a lower --learning-rate, and collect again with the new policy",
        f"ours: KL above {HIGHEST_KL:g} a token",
        _kl,
    ),
)
