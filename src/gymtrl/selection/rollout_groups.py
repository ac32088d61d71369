"""Recorded groups: rollouts of one task whose rewards differ, all groups of one size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import polars as pl

from gymtrl.errors import UserError

from .pool import FAILED, Candidate, Pool, draws


@dataclass(frozen=True)
class GroupChoice:
    """Groups.

    Attributes:
        groups (`list[list[Candidate]]`): Each of `size` rollouts, in the order of the table. The reward is `None` where
            the world spoiled a rollout.
        size (`int`): Rollouts of each group; 0 where there is none.
        unused (`pl.DataFrame`): Every line that is in no group, as `Pool.unused` gives it.
    """

    groups: list[list[Candidate]]
    size: int
    unused: pl.DataFrame


def choose_groups(pool: Pool, size: int | None = None, *, seed: int = 0) -> GroupChoice:
    """Chooses groups in which rewards differ; no threshold is needed.

    A rollout that the world spoiled stays in its group without reward, so that it counts neither as good nor as bad.
    Copies stay too: they tell how often the policy says the same. So does what was cut off by a limit: its reward is
    a measurement, and without it the mean of the group would be another.

    Args:
        pool (`Pool`): What is chosen from.
        size (`int`, *optional*): Rollouts of each group, at least 2. Larger groups give some of theirs, measured ones
            first; smaller ones are left out. Unset: the most frequent size of groups whose rewards differ, of several
            the largest.
        seed (`int`, *optional*, defaults to 0): For the choice within larger groups.

    Returns:
        `GroupChoice`: Possibly without groups.

    Raises:
        `UserError`: If the size is less than 2.
    """
    if size is not None and size < 2:
        raise UserError(f"a group of {size} has nothing to compare", remedy="name a size of 2 or more")
    pool = replace(pool, rows=pool.rows.with_columns(reason=pl.when(~pl.col("cut")).then("reason")))
    reason, reward = pl.col("reason"), pl.col("reward")
    failed = reason.is_in(FAILED) & pl.col("whole")
    rows = pool.rows.filter(reason.is_null() | failed)
    rows = rows.with_columns(draws(rows["row_id"], str(seed))).with_columns(
        members=pl.len().over("group"), differs=reward.min().over("group") < reward.max().over("group")
    )
    alike = ~pl.col("differs").fill_null(False)
    if size is None:
        sizes = rows.filter(~alike).unique("group").group_by("members").len().sort("len", "members")
        size = int(sizes["members"][-1]) if len(sizes) else 0
    rows = rows.with_columns(
        why=pl.when(pl.col("members") < 2)
        .then(pl.lit("group_too_small"))
        .when(alike)
        .then(pl.lit("no_variance"))
        .when(pl.col("members") < size)
        .then(pl.lit("group_too_small"))
    )
    taken = _subsample(rows.filter(pl.col("why").is_null()), size).sort("index")
    of_group: dict[str | None, list[Candidate]] = {}
    for candidate in pool.candidates(taken["index"]):
        of_group.setdefault(candidate.group, []).append(candidate)
    why = rows.with_columns(reason.fill_null(pl.col("why").fill_null("over_size")).alias("why"))
    return GroupChoice(list(of_group.values()), size, pool.unused(taken["index"], why))


def _subsample(rows: pl.DataFrame, size: int) -> pl.DataFrame:
    """Of each group as many as `size`, at random, among them two whose rewards differ."""
    rows = rows.sort("group", pl.col("reward").is_null(), "draw", "index")
    place, first = pl.int_range(pl.len()).over("group"), pl.col("reward").first().over("group")
    rows = rows.with_columns(place=place, other=(pl.col("reward") != first).fill_null(False))
    # Where those drawn are all alike, the last of them gives way to the first that is not.
    nearest = pl.col("place").filter("other").min().over("group")
    swapped = pl.when(pl.col("place") == nearest).then(size - 1).otherwise("place")
    swapped = pl.when(nearest < size).then("place").when(pl.col("place") == size - 1).then(nearest).otherwise(swapped)
    return rows.filter(swapped < size)
