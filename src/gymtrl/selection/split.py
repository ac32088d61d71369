"""Which clusters are held out: a matter of their keys and a salt, so that every round and every machine agrees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.groups import tie


class Keys(NamedTuple):
    """The keys of one rollout that may tie it to others."""

    cluster_key: str
    task_key: str
    input_key: str | None


def hash_value(cluster_key: str, salt: str) -> float:
    """The place of a cluster between 0 and 1."""
    return int(hashlib.sha256((salt + cluster_key).encode()).hexdigest(), 16) / 2**256


def tied_clusters(rollouts: Iterable[Keys]) -> dict[str, str]:
    """Ties clusters that share a task or an input row: torn apart, the held-out one would leak.

    They share one where a task was collected with and without its materialized inputs, or stands in a file twice with
    different metadata.

    Args:
        rollouts (`Iterable[Keys]`): The keys of every rollout.

    Returns:
        `dict[str, str]`: For each cluster key the key that stands for all that are tied to it.
    """
    return tie(
        (keys.cluster_key, [mark for mark in (("task", keys.task_key), ("input", keys.input_key)) if mark[1]])
        for keys in rollouts
    )


def table_clusters(rows: pl.LazyFrame) -> dict[str, str]:
    """As `tied_clusters`, of every rollout of a table, whether it is kept or not."""
    distinct = rows.select(*Keys._fields).filter(pl.col("task_key").is_not_null()).unique()
    keys = distinct.collect(engine="streaming").sort(Keys._fields)
    clusters = pl.col("cluster_key").n_unique()
    # Most tasks and input rows lie in one cluster, and tie nothing.
    shared = (clusters.over("task_key") > 1) | (pl.col("input_key").is_not_null() & (clusters.over("input_key") > 1))
    tied = tied_clusters(Keys(*row) for row in keys.filter(shared).iter_rows())
    return {key: key for key in keys["cluster_key"]} | tied


def held_out_clusters(tied: Mapping[str, str], share: float, salt: str) -> set[str]:
    """Chooses the clusters that are held out.

    A cluster is held out where its hash value lies below the share, and then all that are tied to it. If chance holds
    out none, the one with the smallest value is; if it holds out all, the one with the largest is not.

    Args:
        tied (`Mapping[str, str]`): As `tied_clusters` gives it.
        share (`float`): Between 0 and 1; 0 holds out nothing.
        salt (`str`): What the split is drawn with.

    Returns:
        `set[str]`: Cluster keys.

    Raises:
        `UserError`: If there is one cluster only and something is to be held out.
    """
    if share == 0.0 or not tied:
        return set()
    smallest: dict[str, float] = {}
    for key, stands_for in tied.items():
        value = hash_value(key, salt)
        smallest[stands_for] = min(value, smallest.get(stands_for, value))
    if len(smallest) == 1:
        raise UserError(
            "all rollouts belong to one task or cluster: nothing can be held out",
            remedy="pass --validation 0 to train on all of them, or collect more tasks",
        )
    chosen = {key for key, value in smallest.items() if value < share}
    if not chosen:
        chosen = {min(smallest, key=lambda key: (smallest[key], key))}
    elif len(chosen) == len(smallest):
        chosen.remove(max(smallest, key=lambda key: (smallest[key], key)))
    return {key for key, stands_for in tied.items() if stands_for in chosen}
