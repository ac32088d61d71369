"""Which lines of many a person should look at: few, and yet of every kind."""

from __future__ import annotations

import polars as pl

from .quality import default_threshold
from .record import Origin

MAX_LINE_BYTES = 1_000_000
MAX_BYTES = 8_000_000
"""Of all chosen lines together; a quarter of it is for the rejected ones."""

_PER_REASON = 3
_PLACE = ("file", "line", "offset", "length", "row_id")


def choose_examples(table: pl.LazyFrame, limit: int) -> list[Origin]:
    """Chooses lines to be looked at, spread over tasks, outcomes and reasons for rejection.

    Of a task at most one good and one bad rollout come first, one after the other. Tasks that have both, good ones only
    and bad ones only take turns. Up to a third of the places goes to rejected lines, three a reason at most. Lines of
    more than 1 MB are left out.

    Args:
        table (`pl.LazyFrame`): The rollout table.
        limit (`int`): How many lines at most; fewer where they would exceed 8 MB together.

    Returns:
        `list[Origin]`: Rollouts, then rejected lines; the same for the same table.
    """
    lines = table.filter(pl.col("length") <= MAX_LINE_BYTES)
    rejects = _within(_rejects(lines), limit // 3, MAX_BYTES // 4)
    rollouts = _within(_rollouts(lines), limit - rejects.height, MAX_BYTES * 3 // 4)
    return [Origin(*row) for row in pl.concat([rollouts, rejects]).iter_rows()]


def _within(lines: pl.LazyFrame, limit: int, most_bytes: int) -> pl.DataFrame:
    return lines.select(_PLACE).head(limit).filter(pl.col("length").cum_sum() <= most_bytes).collect()


def _rejects(lines: pl.LazyFrame) -> pl.LazyFrame:
    """Rejected lines, one of each reason, then a second of each, and so on."""
    nth = pl.col("row_id").rank("ordinal").over("reason")
    rejects = lines.filter(pl.col("verdict") == "reject").with_columns(nth=nth)
    return rejects.filter(pl.col("nth") <= _PER_REASON).sort("nth", "reason", "row_id", "file", "line")


def _rollouts(lines: pl.LazyFrame) -> pl.LazyFrame:
    """Rollouts, the kinds of task in turn; the second rollout of an outcome comes after the first of every task."""
    rollouts = lines.filter(pl.col("verdict").is_in(["ok", "context"]))
    valid = rollouts.filter(pl.col("reward").is_finite() & ~pl.col("masked"))
    rewards = valid.select(pl.col("reward").unique()).collect()["reward"]
    threshold, _ = default_threshold(rewards)
    good = rewards.mean() if threshold is None else threshold
    outcome = (
        pl.when(pl.col("masked") | pl.col("reward").is_finite().not_().fill_null(True))
        .then(pl.lit("none"))
        .when(pl.col("reward") >= pl.lit(good, pl.Float64))
        .then(pl.lit("good"))
        .otherwise(pl.lit("bad"))
    )
    return (
        rollouts.with_columns(outcome=outcome)
        .with_columns(
            nth=pl.col("row_id").rank("ordinal").over("task_key", "outcome"),
            first=pl.col("row_id").min().over("task_key"),
            kind=pl.col("outcome").unique().sort().str.join("+").over("task_key") + pl.lit(" ") + pl.col("verdict"),
        )
        .with_columns(turn=pl.col("first").rank("dense").over("nth", "kind"))
        .sort("nth", "turn", "kind", "first", "task_key", "outcome", "row_id", "file", "line")
    )
