"""The rollout table that a selection works from: made for the occasion, or made before by `gymtrl inspect --table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.inputs import expand_inputs, require_rollouts
from gymtrl.rollouts.scan import read_facts, table_for
from gymtrl.rollouts.sidecars import inputs_beside
from gymtrl.rollouts.table import COMPONENT, SCHEMA

from .clusters import TASK_CLUSTER, is_cluster_file, read_clusters, with_clusters
from .lines import PLACE
from .settings import FilterSettings
from .where import parse_where

_MAKE = "make it with: gymtrl inspect ROLLOUTS --table TABLE.parquet"


@dataclass(frozen=True)
class Source:
    """What is chosen from.

    Attributes:
        rows (`pl.LazyFrame`): The rollout table, with the clusters that the user named.
        files (`list[Path]`): The rollout files, in the order of the table.
        clusters (`dict[str, str]`): Task or input key → cluster, from the user's file.
        blind (`bool`): The clusters of tasks without a rollout cannot be known: the table was made with others.
    """

    rows: pl.LazyFrame
    files: list[Path]
    clusters: dict[str, str]
    blind: bool


def is_table(inputs: Sequence[Path]) -> bool:
    """Whether the input is a rollout table.

    Raises:
        `UserError`: If a table is named together with something else.
    """
    tables = [path for path in inputs if path.suffix == ".parquet"]
    if tables and len(inputs) > 1:
        raise UserError(
            f"{tables[0]} is a table and stands alone: it names its rollout files itself",
            remedy="name one table, or the rollout files; gymtrl inspect FILES --table makes one table of many files",
        )
    return bool(tables)


def dotted_cluster(settings: FilterSettings) -> str | None:
    """The dotted path to the cluster, where the user named one."""
    return None if is_cluster_file(settings.cluster) else settings.cluster


def files_read(inputs: Sequence[Path], settings: FilterSettings | None = None) -> list[Path]:
    """Every file that the result depends on.

    Args:
        inputs (`Sequence[Path]`): Rollout files, folders of them, or one table.
        settings (`FilterSettings`, *optional*): Where they name files, these count as well.

    Returns:
        `list[Path]`: The table, the rollout files, the materialized inputs beside them, cluster file and benchmarks.
    """
    files = expand_inputs(inputs)
    if is_table(files):
        table, files = files, _files_of(_open(files[0]))
    else:
        table = []
    sidecars = [inputs_beside(file) for file in files]
    found = [*table, *files, *(path for path in sidecars if path is not None)]
    if settings is not None:
        found += [Path(settings.cluster)] if settings.cluster and is_cluster_file(settings.cluster) else []
        found += settings.benchmark or []
    return found


def open_source(
    inputs: Sequence[Path],
    folder: Path,
    settings: FilterSettings,
    on_bytes: Callable[[int], object] | None = None,
) -> Source:
    """Makes or opens the table.

    Args:
        inputs (`Sequence[Path]`): Rollout files, folders of them, or one table.
        folder (`Path`): Where a new table is put; it must outlive the result.
        settings (`FilterSettings`): For the clusters and the names of agents and environments.
        on_bytes (`Callable`, *optional*): Called with the number of bytes read since the last call.

    Raises:
        `UserError`: If there is no rollout, the table is none, or a name is unknown.
    """
    files = expand_inputs(inputs)
    dotted = dotted_cluster(settings)
    ready = is_table(files)
    clusters = _look_ahead(settings, ready=ready)
    rows = _open(table_for(files, folder, cluster=dotted, max_line_bytes=settings.max_line_bytes, on_bytes=on_bytes))
    require_rollouts(files, _verdicts(rows))
    _known_names(rows, settings)
    own = pl.col("cluster_key") == TASK_CLUSTER
    blind = ready and dotted is None and not rows.select(own.fill_null(True).all()).collect().item()
    if settings.cluster is not None and is_cluster_file(settings.cluster):
        rows, blind = with_clusters(rows, clusters, settings.cluster), False
    return Source(rows, _files_of(rows) if ready else files, clusters, blind)


def _look_ahead(settings: FilterSettings, *, ready: bool) -> dict[str, str]:
    """Finds what is wrong with the settings before minutes go by reading; returns the clusters of the user's file."""
    given = settings.model_fields_set
    if settings.balance == "none" and "cap_per_task" in given:
        raise UserError(
            f"--cap-per-task {settings.cap_per_task} has no effect with --balance none, which keeps all of a task",
            remedy="leave out one of the two",
        )
    if ready and "max_line_bytes" in given:
        raise UserError(
            f"--max-line-bytes {settings.max_line_bytes} has no effect on a table, whose lines are read already",
            remedy="leave it out, or name the rollout files instead of the table",
        )
    if settings.where is not None and not ready:  # a table that is ready may have columns of its own
        parse_where(settings.where, list(SCHEMA), prefix=COMPONENT)
    for path in settings.benchmark or ():
        if not path.is_file():
            raise UserError(f"{path} does not exist", remedy="--benchmark names a JSONL file, one task a line")
    return read_clusters(Path(settings.cluster)) if settings.cluster and is_cluster_file(settings.cluster) else {}


def _open(path: Path) -> pl.LazyFrame:
    read_facts(path)  # refuses what is no table
    rows = pl.scan_parquet(path, glob=False)
    if rows.select(pl.any_horizontal(pl.col(PLACE).is_null().any())).collect(engine="streaming").item():
        raise UserError(f"{path} has rows without a place in a file", remedy=_MAKE)
    return rows.drop("split", "drop_reason", strict=False)


def _files_of(rows: pl.LazyFrame) -> list[Path]:
    return [Path(name) for name in rows.select(pl.col("file").unique(maintain_order=True)).collect()["file"]]


def _verdicts(rows: pl.LazyFrame) -> dict[str, int]:
    counted = rows.group_by("verdict", "reason").agg(pl.len()).sort("verdict", "reason").collect()
    return {f"{verdict}:{reason}" if reason else verdict: count for verdict, reason, count in counted.iter_rows()}


def _known_names(rows: pl.LazyFrame, settings: FilterSettings) -> None:
    for column in ("agent", "environment"):
        asked = [*(getattr(settings, f"{column}s") or ()), *(getattr(settings, f"exclude_{column}s") or ())]
        if not asked:
            continue
        names = sorted(rows.select(pl.col(column).drop_nulls().unique()).collect()[column])
        for name in asked:
            if name not in names:
                raise UserError(
                    f"no rollout has the {column} {name!r}",
                    remedy=f"{column}s: {', '.join(names)}" if names else f"the rollouts name no {column}",
                )
