"""The clusters of tasks that may have no rollout yet, as a filter would name them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import decode_json
from gymtrl.rollouts.keys import input_key, named_cluster
from gymtrl.rollouts.record import Origin

from .clusters import TASK_CLUSTER, as_named, is_cluster_file, names_by_task_key, read_clusters
from .held_out import asked_task_key


def task_clusters(
    tasks: Path, source: Path, name: str | None, rows: pl.DataFrame
) -> Iterator[tuple[int, Set[str] | None]]:
    """Finds the clusters of tasks.

    Args:
        tasks (`Path`): JSONL of Gym input rows.
        source (`Path`): What was filtered, for messages.
        name (`str`, *optional*): What the filter was given as `cluster`.
        rows (`pl.DataFrame`): Rows of a pool.

    Returns:
        `Iterator[tuple[int, set[str] | None]]`: For each line its clusters, by its rollouts or as the row or the file
        names them; empty where it is a cluster of its own; `None` where that is not known. Nothing where every task is
        a cluster of its own.

    Raises:
        `UserError`: If the cluster file is gone, or names other clusters than it did for the filter.
    """
    rows = rows.filter(pl.col("task_key").is_not_null())
    own = rows.select((pl.col("cluster_key") == TASK_CLUSTER).fill_null(True)).to_series()
    if name is None and own.all():
        return
    known: defaultdict[str, set[str]] = defaultdict(set)
    for column in ("task_key", "input_key"):
        for key, cluster in rows.select(column, "cluster_key").drop_nulls().unique().iter_rows():
            known[key].add(cluster)
    from_file = name is not None and is_cluster_file(name)
    named = _in_file(Path(str(name)), source, rows) if from_file else _in_row(name, every=not own.any())
    with tasks.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row: Any = decode_json(line)
            task = asked_task_key(row, Origin(str(tasks), number, 0, len(line), ""))
            keys = [key for key in (input_key(row), task) if key is not None]
            rolled_out = {cluster for key in keys if key in known for cluster in known[key]}
            yield number, rolled_out or named(row, keys)


_Named = Callable[[Any, Sequence[str]], Set[str] | None]


def _in_row(path: str | None, *, every: bool) -> _Named:
    """The clusters that rows name. Where every row of the table names one, a row without has one too."""

    def named(row: Any, keys: Sequence[str]) -> Set[str] | None:
        cluster = named_cluster(path, row, None) if path is not None else None
        if cluster is not None:
            return {cluster}
        return None if path is None or every else set()

    return named


def _in_file(path: Path, source: Path, rows: pl.DataFrame) -> _Named:
    back = "put it back as it was, or pass --no-leak-check to validate all the same"
    if not path.is_file():
        raise UserError(f"{source} was made with the clusters of {path}, which is not there any more", remedy=back)
    clusters = read_clusters(path)
    if not as_named(rows.lazy(), clusters):
        raise UserError(f"{source} was made with other clusters than {path} names now", remedy=back)
    by_task = names_by_task_key(path)

    def named(row: Any, keys: Sequence[str]) -> Set[str] | None:
        found = {clusters[key] for key in keys if key in clusters}
        # A harness may have changed the prompt, and with it the task key.
        return found or (None if by_task else set())

    return named
