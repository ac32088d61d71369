"""Inspecting rollout files: their summary with the rollout table on the way, and any single line of them."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import polars as pl

from gymtrl.errors import UserError

from .inputs import expand_inputs
from .outputs import check_output
from .reader import MAX_LINE_BYTES, read_at
from .reasons import remedy_for
from .record import Line, Origin
from .scan import table_for
from .summary import Summary, summarize

_CHUNK = 1 << 20


def inspect_rollouts(
    inputs: Sequence[Path],
    *,
    cluster: str | None = None,
    reward_threshold: float | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    workers: int | None = None,
    table: Path | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Summary:
    """Summarises rollout files.

    Args:
        inputs (`Sequence[Path]`): Files, or folders that hold them; or one rollout table that was made before.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        reward_threshold (`float`, *optional*): Lowest good reward; as the kind of the rewards tells if not given.
        max_line_bytes (`int`, *optional*, defaults to 64 MB): Longer lines are refused unread.
        workers (`int`, *optional*): Processes that read, as in `scan.write_table`.
        table (`Path`, *optional*): Parquet file to write the rollout table to, one row per line.
        on_bytes (`Callable[[int], object]`, *optional*): Called with the number of bytes read since the last call.

    Returns:
        `Summary`: Plain data. With the table, `reports.inspection_page.write_page` makes a page of it.

    Raises:
        `UserError`: If an input is missing, or a folder without rollout files; if `table` cannot be written or would
            overwrite an input; if the threshold is not finite.
    """
    if reward_threshold is not None and not math.isfinite(reward_threshold):
        raise UserError(f"the reward threshold {reward_threshold} is not finite", remedy="name a number")
    if table is not None:
        check_output(table, inputs)
    with tempfile.TemporaryDirectory(prefix=".inspect-", dir=table and table.absolute().parent) as folder:
        made = table_for(
            inputs, Path(folder), cluster=cluster, max_line_bytes=max_line_bytes, workers=workers, on_bytes=on_bytes
        )
        summary = summarize(pl.scan_parquet(made, glob=False), reward_threshold=reward_threshold)
        if table is not None:
            draft = Path(folder) / "table.parquet"
            if made != draft:
                shutil.copyfile(made, draft)
            draft.replace(table)
    return summary


def read_row(place: str, *, cluster: str | None = None, unpacked: Path | None = None) -> Line:
    """Reads one line of a rollout file.

    Args:
        place (`str`): `FILE:LINE`, as every view of gymtrl names it; lines count from 1.
        cluster (`str`, *optional*): As in `inspect_rollouts`.
        unpacked (`Path`, *optional*): Where the file is packed, a plain copy of it, which is read instead.

    Returns:
        `Line`: With its verdict. Its place is that in the file that was read.

    Raises:
        `UserError`: If there is no such file or line, or the line is blank or longer than 64 MB.
    """
    name, _, number = place.rpartition(":")
    if not name or not number.isdecimal() or int(number) < 1:
        raise UserError(f"'{place}' is not FILE:LINE", remedy="name a line as in rollouts.jsonl:12; lines count from 1")
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder", remedy="name one of the files in it")
    files = expand_inputs([unpacked or Path(name)])
    if len(files) > 1:
        raise UserError(
            f"{name} stands for {len(files):,} files", remedy=f"name one of them, as in {files[0]}:{number}"
        )
    return read_at(_find(files[0], int(number), name if unpacked else str(files[0])), cluster=cluster)


def _find(file: Path, wanted: int, name: str) -> Origin:
    with file.open("rb") as stream:
        number = 1
        while number < wanted and _pass_over(stream):
            number += 1
        offset = stream.tell()
        raw = stream.readline(MAX_LINE_BYTES + 2)
    if not raw:
        raise UserError(f"{name}:{wanted} does not exist: the file ends before", remedy=f"it has {number - 1:,} lines")
    data = raw.rstrip(b"\r\n")
    if len(data) > MAX_LINE_BYTES:
        message = f"{name}:{wanted} has more than {MAX_LINE_BYTES:,} bytes"
        raise UserError(message, remedy=remedy_for("reject", "line_too_long"))
    if not data.strip():
        raise UserError(f"{name}:{wanted} is blank", remedy="name the line before or after it")
    return Origin(str(file), wanted, offset, len(data), hashlib.sha256(data).hexdigest()[:16])


def _pass_over(stream: BinaryIO) -> bool:
    """Reads one line of any length; `False` at the end of the file."""
    chunk = stream.readline(_CHUNK)
    found = bool(chunk)
    while chunk and not chunk.endswith(b"\n"):
        chunk = stream.readline(_CHUNK)
    return found
