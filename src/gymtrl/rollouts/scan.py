"""Rollout files → the rollout table on disk, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .reader import read_lines
from .table import rollout_table


def write_table(
    inputs: Sequence[Path], out: Path, *, cluster: str | None = None, on_bytes: Callable[[int], object] | None = None
) -> None:
    """Reads rollout files and writes their table as Parquet.

    Args:
        inputs (`Sequence[Path]`): Rollout files, or folders that hold them.
        out (`Path`): The file to write.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        on_bytes (`Callable[[int], object]`, *optional*): Called with the number of bytes read since the last call.
    """
    rollout_table(read_lines(inputs, cluster=cluster)).write_parquet(out)


def table_for(
    inputs: Sequence[Path],
    folder: Path,
    *,
    cluster: str | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Path:
    """The table of the inputs: one that exists already, where a single `.parquet` is named, else a new one in `folder`.

    Args:
        inputs (`Sequence[Path]`): One table made before, or rollout files and folders.
        folder (`Path`): Where a new table is written.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        on_bytes (`Callable[[int], object]`, *optional*): As in `write_table`.

    Returns:
        `Path`: A Parquet file with the columns of `table.SCHEMA`.
    """
    if len(inputs) == 1 and inputs[0].suffix == ".parquet":
        return inputs[0]
    path = folder / "table.parquet"
    write_table(inputs, path, cluster=cluster, on_bytes=on_bytes)
    return path
