"""Rules about the data and the plan: what can be said before a model is loaded."""

from __future__ import annotations

from gymtrl.doctor.rule import OBJECTIVES, PREFLIGHT, Rule
from gymtrl.doctor.run import RunRecord

FEW_LOSS_TOKENS = 0.01
MANY_DUPLICATES = 0.1
MANY_DROPPED = 0.05
FEW_ROWS = 100
FEW_STEPS = 10
LENGTH_RATIO = 1.5
LONGER_SHARE = 0.7
FEWEST_SIDES = 20
"""Rows of each kind below which a median length says little (ours)."""

_CUT = ("too_long", "truncated")
_DOCS = "see the loss mask of some rows with 'gymtrl format {objective} ... --show 3'"


def _few_loss_tokens(run: RunRecord) -> str | None:
    if run.data is None or not 0 < run.data.loss_tokens < FEW_LOSS_TOKENS * run.data.tokens:
        return None
    share = run.data.loss_tokens / run.data.tokens
    return f"{run.data.loss_tokens:,} of {run.data.tokens:,} tokens carry loss ({share:.2%})"


def _duplicates(run: RunRecord) -> str | None:
    if run.data is None or run.data.duplicates <= MANY_DUPLICATES * run.data.rows:
        return None
    return f"{run.data.duplicates:,} of {run.data.rows:,} rows stand in the data already"


def _cut(run: RunRecord) -> str | None:
    if run.data is None:
        return None
    lost = {reason: run.data.dropped[reason] for reason in _CUT if run.data.dropped.get(reason)}
    if sum(lost.values()) <= MANY_DROPPED * run.data.read:
        return None
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    return f"of {run.data.read:,} lines {reasons}"


def _batch_larger_than_data(run: RunRecord) -> str | None:
    if run.data is None or run.effective_batch is None or run.data.rows >= run.effective_batch:
        return None
    return f"{run.data.rows:,} rows, {run.effective_batch} of them in an optimizer step"


def _few_rows(run: RunRecord) -> str | None:
    if run.data is None or run.data.rows >= FEW_ROWS:
        return None
    return f"{run.data.rows:,} rows" + (f" of {run.data.tasks:,} tasks" if run.data.tasks else "")


def _few_steps(run: RunRecord) -> str | None:
    if run.planned_steps is None or run.planned_steps >= FEW_STEPS:
        return None
    return f"{run.planned_steps} optimizer steps"


def _length_bias(run: RunRecord) -> str | None:
    facts = run.data
    if facts is None or not facts.bad_length or facts.good_length < LENGTH_RATIO * facts.bad_length:
        return None
    told = f"median length {facts.good_length:,.0f} tokens of the good side, {facts.bad_length:,.0f} of the bad"
    if run.objective == "kto":
        return told if min(facts.good, facts.bad) >= FEWEST_SIDES else None
    count, of = (facts.groups - facts.groups_alike, "groups") if run.objective == "grpo" else (facts.rows, "pairs")
    if count < FEWEST_SIDES or facts.longer_share < LONGER_SHARE:
        return None
    return f"{told}; the good one is longer in {facts.longer_share:.0%} of the {of}"


DATA_RULES = (
    Rule(
        "few_loss_tokens",
        PREFLIGHT,
        OBJECTIVES,
        "warning",
        "Hardly any token carries loss",
        "Long prompts or results of tools around short answers, or masks that leave out turns of the policy.",
        "If turns of the policy are left out, make the dataset again; " + _DOCS,
        f"ours: below {FEW_LOSS_TOKENS:.0%}",
        _few_loss_tokens,
    ),
    Rule(
        "duplicates",
        PREFLIGHT,
        # Groups are recorded whole: equal rollouts in them say how often the policy gives that answer.
        ("sft", "dpo", "kto"),
        "warning",
        "Many rows are copies",
        "The same rollout was collected or given twice; the run learns such rows by heart.",
        "Filter again with 'gymtrl filter ... --dedup exact', or --dedup near, and format again",
        f"ours: above {MANY_DUPLICATES:.0%}",
        _duplicates,
    ),
    Rule(
        "long_rows_lost",
        PREFLIGHT,
        OBJECTIVES,
        "warning",
        "Long rollouts are missing",
        "Rows above --max-length and answers that a limit cut off are left out; what is left favours short answers.",
        "Format again with a larger --max-length, or collect again with a higher limit of output tokens",
        f"ours: above {MANY_DROPPED:.0%} of the lines",
        _cut,
    ),
    Rule(
        "length_bias",
        PREFLIGHT,
        ("dpo",),
        "warning",
        "Good answers are much longer than bad ones",
        "Length tells good from bad, and preference training learns length before all else (arXiv:2403.19159): the "
        "policy drifts to long answers.",
        "Train with 'gymtrl train dpo ... --loss-type sigmoid_norm --beta 5', which goes by the mean over a side's "
        "tokens; where rewards are graded, make pairs of like length with 'gymtrl format dpo ... --strategy "
        "length_matched'",
        f"ours: {LENGTH_RATIO:g} times as long, in {LONGER_SHARE:.0%} of the pairs",
        _length_bias,
    ),
    Rule(
        "length_bias_unpaired",
        PREFLIGHT,
        ("kto", "grpo"),
        "warning",
        "Good rollouts are much longer than bad ones",
        "Length tells good from bad, and is learned before all else (arXiv:2403.19159): the policy drifts to long "
        "answers.",
        "Leave out the longest rollouts with 'gymtrl filter ... --max-completion-chars N', and collect more tasks in "
        "which short answers are right",
        f"ours: {LENGTH_RATIO:g} times as long; in groups, in {LONGER_SHARE:.0%} of those whose rewards differ",
        _length_bias,
    ),
    Rule(
        "batch_larger_than_data",
        PREFLIGHT,
        OBJECTIVES,
        "warning",
        "One step takes all rows",
        "The effective batch is larger than the data, so that an epoch is a single step.",
        "Set --effective-batch to a quarter of the rows or less, or collect more rollouts",
        "certain",
        _batch_larger_than_data,
    ),
    Rule(
        "few_steps",
        PREFLIGHT,
        OBJECTIVES,
        "warning",
        "Very few optimizer steps",
        "Few rows, a large effective batch or a small --max-steps; the learning rate hardly gets to its peak.",
        "Train {longer}",
        f"ours: below {FEW_STEPS}",
        _few_steps,
    ),
    Rule(
        "few_rows",
        PREFLIGHT,
        OBJECTIVES,
        "note",
        "Little data",
        "Few rollouts passed the filter. The model learns these rows rather than the task.",
        "Collect more tasks, or more repeats of each; a validation split shows what is learned by heart",
        f"ours: below {FEW_ROWS} rows; LIMA (arXiv:2305.11206) needed 1,000 chosen ones",
        _few_rows,
    ),
)
