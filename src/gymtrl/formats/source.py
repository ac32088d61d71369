"""The lines that a dataset is made of, each with its keys and the place that the user knows it by."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.formats.settings import FormatSettings
from gymtrl.models.fingerprint import load_config, local_folder
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Line
from gymtrl.rollouts.sidecars import inputs_beside

SPLITS = ("train", "validation")

_REMEDY = "give the folder that 'gymtrl filter' wrote, or a rollout file"
_TOKEN_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_KEYS = ("file", "line", "task_key", "input_key", "cluster_key")


@dataclass(frozen=True)
class Identity:
    """What a row of a dataset says of the rollout that it came from.

    Attributes:
        row_id (`str`): Of the rollout's line.
        file (`str`): Where the user's line stood.
        line (`int`): Its number, from 1.
        task_key, input_key, cluster_key (`str`, *optional*): Its task, the task's input row, and what a split must keep
            together; `None` where the line is no rollout.
    """

    row_id: str
    file: str
    line: int
    task_key: str | None
    input_key: str | None
    cluster_key: str | None


@dataclass(frozen=True)
class SourceLine:
    """A line, the side of the split that it is on, and its identity."""

    split: str
    line: Line
    identity: Identity


def format_inputs(source: Path, settings: FormatSettings) -> list[Path]:
    """Every file and folder that a dataset of `source` depends on.

    Args:
        source (`Path`): As the format verbs take it.
        settings (`FormatSettings`): Name the model.

    Returns:
        `list[Path]`: The source; of a rollout file the materialized inputs beside it; of a local model the files that
            decide tokens.

    Raises:
        UserError: The source or the model's folder is missing.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist", remedy=_REMEDY)
    sidecar = None if source.is_dir() else inputs_beside(source)
    model = local_folder(settings.model)
    deciding = {path for pattern in _TOKEN_FILES for path in model.glob(pattern)} if model is not None else ()
    return [source, *([sidecar] if sidecar is not None else []), *sorted(path for path in deciding if path.is_file())]


def split_files(source: Path) -> dict[str, Path]:
    """The files of each split: of a filter folder both, of a rollout file itself.

    Raises:
        UserError: There is none.
    """
    if source.is_dir():
        files = {split: source / f"{split}.jsonl" for split in SPLITS}
        if not files["train"].is_file():
            raise UserError(f"{source} holds no train.jsonl", remedy=_REMEDY)
        return {split: path for split, path in files.items() if path.is_file()}
    if not source.is_file():
        raise UserError(f"{source} does not exist", remedy=_REMEDY)
    return {"train": source}


def source_lines(source: Path) -> Iterator[SourceLine]:
    """Reads the lines of a filter folder or a rollout file, one at a time."""
    for split, path in split_files(source).items():
        known = _TableRows(source / "table.parquet", split) if source.is_dir() else None
        if not path.stat().st_size:
            continue
        for line in read_lines([path]):
            given = known.find(line.origin.row_id) if known is not None else {}
            yield SourceLine(split, line, _identity(line, given))


def longest_row(settings: FormatSettings) -> int | None:
    """Most tokens that a row may have: what the user set, and what the model's context holds."""
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (settings.max_length, context) if isinstance(limit, int)]
    return min(limits, default=None)


class _TableRows:
    """Where the rows of a filter folder came from, and their keys, which a sidecar or the user may have given.

    The table and the split's file have the same order, so that little is held at a time.
    """

    def __init__(self, table: Path, split: str) -> None:
        self._rows = _rows_of_table(table, split)
        self._passed: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)

    def find(self, row_id: str) -> dict[str, Any]:
        """The next row of that id; empty where the table has none, as for lines that the user has added."""
        if self._passed.get(row_id):
            return self._passed[row_id].popleft()
        for row in self._rows:
            found: str = row.pop("row_id")
            if found == row_id:
                return row
            self._passed[found].append(row)
        return {}


def _rows_of_table(table: Path, split: str) -> Iterator[dict[str, Any]]:
    if not table.is_file():
        return
    columns = pq.read_schema(table).names
    if not {"row_id", "split"} <= set(columns):
        return
    wanted = ["row_id", "split", *(name for name in _KEYS if name in columns)]
    for batch in pq.ParquetFile(table).iter_batches(batch_size=1024, columns=wanted):
        for row in batch.to_pylist():
            if row.pop("split") == split:
                yield {name: value for name, value in row.items() if value is not None}


def _identity(line: Line, given: dict[str, Any]) -> Identity:
    rollout = line.rollout
    return Identity(
        row_id=line.origin.row_id,
        file=given.get("file", line.origin.file),
        line=given.get("line", line.origin.line),
        task_key=given.get("task_key", rollout and rollout.task_key),
        input_key=given.get("input_key", rollout and rollout.input_key),
        cluster_key=given.get("cluster_key", rollout and rollout.cluster_key),
    )
