"""Inspecting rollout files: their summary, and the rollout table on the way."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from .scan import table_for
from .summary import Summary, summarize


def inspect_rollouts(inputs: Sequence[Path], *, cluster: str | None = None, table: Path | None = None) -> Summary:
    """Summarises rollout files by way of their table.

    Args:
        inputs (`Sequence[Path]`): Files, or folders that hold them; or one table made before.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        table (`Path`, *optional*): Parquet file to write the rollout table to, one row per line.

    Raises:
        `UserError`: If an input is missing or there is nothing in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = table_for(inputs, Path(folder), cluster=cluster)
        if table is not None:
            draft = table.with_name(f".{table.name}.partial")
            shutil.copyfile(made, draft)
            draft.replace(table)
        return summarize(pl.scan_parquet(made, glob=False))
