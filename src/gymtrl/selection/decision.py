"""What becomes of each row: why it is dropped, or on which side of the split it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from gymtrl.errors import UserError

from .choice import Choice
from .rules import drop_sentence
from .split import held_out_clusters, table_clusters
from .threshold import Threshold

TRAIN, VALIDATION, DROPPED = "train", "validation", "dropped"


@dataclass(frozen=True)
class Decision:
    """What becomes of each row.

    Attributes:
        reasons (`pl.Series`): Why it is dropped, null where it is not.
        splits (`pl.Series`): `train`, `validation` or `dropped`.
        tasks (`pl.Series`): A number that stands for its task.
        held_out (`set[str]`): Clusters that are held out.
        is_held_out (`pl.Series`): Whether its cluster is.
    """

    reasons: pl.Series
    splits: pl.Series
    tasks: pl.Series
    held_out: set[str]
    is_held_out: pl.Series

    def rows(self) -> dict[str, int]:
        """Rows that are kept on each side of the split."""
        return {side: int((self.splits == side).sum()) for side in (TRAIN, VALIDATION)}

    def kept_tasks(self) -> dict[str, int]:
        """Tasks of these rows."""
        return {side: self.tasks.filter(self.splits == side).n_unique() for side in (TRAIN, VALIDATION)}


def drop_reasons(choice: Choice, threshold: Threshold) -> pl.Series:
    """Why each row is dropped; null where it is kept.

    Raises:
        `UserError`: If rows are left that need a threshold, and there is none.
    """
    if not choice.state.reasons.null_count():
        return choice.state.reasons
    return choice.at(threshold.of_rows(choice.state))


def divide(choice: Choice, reasons: pl.Series, threshold: Threshold) -> Decision:
    """Divides what is kept into what is trained on and what is held out.

    Args:
        choice (`Choice`): The rows.
        reasons (`pl.Series`): As `drop_reasons` gives them.
        threshold (`Threshold`): For the words of an error.

    Raises:
        `UserError`: If nothing is left to train on, or there is one task only and something is to be held out.
    """
    state = choice.state
    if not reasons.null_count():
        raise _nothing_left(reasons, 0, threshold)
    held_out = held_out_clusters(table_clusters(state.rows), state.settings.validation, state.settings.split_salt)
    inside = pl.col("cluster_key").is_in(list(held_out)).fill_null(False)
    is_held_out = state.rows.select(inside).collect().to_series()
    decision = Decision(reasons, _splits(reasons, is_held_out), state.tasks, held_out, is_held_out)
    rows = decision.rows()
    if not rows[TRAIN]:
        raise _nothing_left(reasons, rows[VALIDATION], threshold)
    return decision


def counted(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, most frequent first; nulls are not counted."""
    counts = values.drop_nulls().alias("value").value_counts().sort("count", "value", descending=[True, False])
    return dict(counts.iter_rows())


def _splits(reasons: pl.Series, is_held_out: pl.Series) -> pl.Series:
    kept = pl.when("held_out").then(pl.lit(VALIDATION)).otherwise(pl.lit(TRAIN))
    split = pl.when(pl.col("reason").is_null()).then(kept).otherwise(pl.lit(DROPPED))
    return (
        pl.DataFrame([reasons.alias("reason"), is_held_out.alias("held_out")]).select(split.alias("split")).to_series()
    )


def _nothing_left(reasons: pl.Series, validation: int, threshold: Threshold) -> UserError:
    dropped = counted(reasons)
    table = "\n".join(f"  {count:>7}  {reason}: {drop_sentence(reason)}" for reason, count in dropped.items())
    if validation:
        what = f"all {validation} rollouts that are good enough belong to held-out tasks: nothing is left to train on"
        remedy = "collect more, pass another --split-salt, or --validation 0"
    else:
        what = f"none of the {len(reasons)} lines is worth training on"
        remedy = _remedy(dropped, threshold)
    return UserError(f"{what}\n{table}", remedy=remedy)


def _remedy(dropped: Mapping[str, int], threshold: Threshold) -> str:
    most = next(iter(dropped))
    if most == "below_threshold":
        found = threshold.why if threshold.value is None else f"the threshold is {threshold.value:g} ({threshold.why})"
        highest = f"{max(threshold.rewards):g}"
        return f"{found}, the highest reward {highest}: collect more rollouts, or lower --reward-threshold"
    if most == "reward_missing":
        return "the rows carry no reward: collect with an environment that verifies, or let Gym verify them again"
    if most.startswith("context:"):
        return "--keep-context keeps rollouts whose context is not complete"
    if most == "truncated":
        return "collect with a larger --max-output-tokens, or pass --keep-truncated"
    if most.partition(":")[0] in ("reject", "skip"):
        return "gymtrl inspect shows file, line and cause of each"
    return "gymtrl filter --dry-run shows how many rows each rule leaves"
