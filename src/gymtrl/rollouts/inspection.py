"""Inspecting rollout files: their summary, and the rollout table on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .inputs import expand_inputs
from .reader import read_lines
from .record import Line
from .summary import Summary, summarize
from .table import table_of, table_row


def inspect_rollouts(inputs: Sequence[Path], *, cluster: str | None = None, table: Path | None = None) -> Summary:
    """Summarises rollout files in one pass.

    Args:
        inputs (`Sequence[Path]`): Files, or folders that hold them.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        table (`Path`, *optional*): Parquet file to write the rollout table to, one row per line.

    Raises:
        `UserError`: If an input is missing or there is nothing in it.
    """
    files = expand_inputs(inputs)
    rows: list[dict[str, Any]] = []

    def noted() -> Iterator[Line]:
        for line in read_lines(files, cluster=cluster):
            if table is not None:
                rows.append(table_row(line))
            yield line

    summary = summarize(noted())
    if table is not None:
        draft = table.with_name(f".{table.name}.partial")
        table_of(rows).write_parquet(draft)
        draft.replace(table)
    return summary
