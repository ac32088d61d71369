"""Clusters that the user names in a file: rows of a task and the cluster that it belongs to."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import decode_json, digest

TASK_CLUSTER = pl.coalesce("input_key", "task_key")
"""The cluster of a task that nobody named one for."""

_LINE = 'one JSON object a line: {"task_key": "…", "cluster": "…"} or {"input_key": "…", "cluster": "…"}'


def is_cluster_file(cluster: str | None) -> bool:
    """Whether the setting names a file, not a dotted path."""
    return cluster is not None and cluster.endswith(".jsonl")


def read_clusters(path: Path) -> dict[str, str]:
    """Reads a cluster file.

    Returns:
        `dict[str, str]`: Task or input key → cluster key.

    Raises:
        `UserError`: If a line is no such row, or names another cluster for a task that has one.
    """
    clusters: dict[str, str] = {}
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    _note(clusters, line, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", remedy=f"--cluster names a file of {_LINE}") from None
    return clusters


def names_by_task_key(path: Path) -> bool:
    """Whether a line of a cluster file names its task by task key alone, which an input row does not tell."""
    with path.open("rb") as stream:
        rows = (decode_json(line) for line in stream if not line.isspace())
        return any(row.get("input_key") is None for row in rows)


def as_named(rows: pl.LazyFrame, clusters: dict[str, str]) -> bool:
    """Whether the tasks of a table are still in the clusters that the file names."""
    now = pl.coalesce(_named(clusters), TASK_CLUSTER)
    return bool(rows.select(pl.col("cluster_key").eq_missing(now).all()).collect().item())


def with_clusters(rows: pl.LazyFrame, clusters: dict[str, str], name: str) -> pl.LazyFrame:
    """The table with `cluster_key` as the file says; a task that it does not name is its own cluster.

    Raises:
        `UserError`: If the file names none of the tasks.
    """
    rows = rows.with_columns(cluster_key=pl.coalesce(_named(clusters), TASK_CLUSTER))
    if not rows.select(_named(clusters).is_not_null().any()).collect().item():
        raise UserError(
            f"{name} names none of the tasks of these rollouts",
            remedy="its keys are those of the rollout table: gymtrl inspect ROLLOUTS --table TABLE.parquet",
        )
    return rows


def count_unnamed(rows: pl.LazyFrame, clusters: dict[str, str]) -> int:
    """How many tasks the file does not name, by any of their keys."""
    tasks = (
        rows.filter(pl.col("task_key").is_not_null())
        .group_by("task_key")
        .agg(named=_named(clusters).is_not_null().any())
    )
    return int(tasks.select((~pl.col("named")).sum()).collect().item())


def _named(clusters: dict[str, str]) -> pl.Expr:
    keys = pl.Series(list(clusters), dtype=pl.String)
    values = pl.Series(list(clusters.values()), dtype=pl.String)
    found = (
        pl.col(column).replace_strict(keys, values, default=None, return_dtype=pl.String)
        for column in ("task_key", "input_key")
    )
    return pl.coalesce(*found)


def _note(clusters: dict[str, str], line: bytes, where: str) -> None:
    try:
        row = decode_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}", remedy=f"expected {_LINE}") from None
    cluster = row.get("cluster") if isinstance(row, dict) else None
    keys = [row[name] for name in ("task_key", "input_key") if row.get(name) is not None] if cluster is not None else []
    if not keys or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{where}: no task with a cluster", remedy=f"expected {_LINE}")
    for key in keys:
        if clusters.setdefault(key, digest(cluster)) != digest(cluster):
            raise UserError(f"{where}: the task {key[:16]}… stands in another cluster already", remedy="name it once")
