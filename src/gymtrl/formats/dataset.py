"""The Parquet files of a dataset folder, written row by row."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_GROUP = 256

_VIEW_COLUMNS = ("prompt", "completion", "tools")

DROPPED_SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "file": pa.string(),
        "line": pa.int64(),
        "split": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
    }
)


def sft_schema() -> tuple[pa.Schema, pa.Schema]:
    """Returns the columns of an SFT dataset: as they are collected, and as they are stored.

    They differ in the view columns, which hold dumped JSON and are stored as `datasets` stores `List(Json())`. Dumping
    them here keeps floats and keys with null, both of which `datasets` would change if it got objects.
    """
    from datasets import Features, Json, List, Value

    text = Value("string")
    features = Features(
        {
            "row_id": text,
            "file": text,
            "line": Value("int64"),
            "task_key": text,
            "input_key": text,
            "cluster_key": text,
            "reward": Value("float64"),
            "route": text,
            "flags": List(text),
            "record_json": text,
            **{name: List(Json()) for name in _VIEW_COLUMNS},
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
        }
    )
    stored = features.arrow_schema
    collected = pa.schema(
        [pa.field(field.name, pa.list_(pa.string())) if field.name in _VIEW_COLUMNS else field for field in stored]
    )
    return collected, stored


class ParquetRows:
    """A Parquet file that takes one row at a time and holds no more than a row group in memory.

    The file appears with the first row, so an empty split leaves none.

    Args:
        path (`Path`): File to write; its folder must exist.
        collected (`pa.Schema`): Types of the rows as they are given.
        stored (`pa.Schema`, *optional*): Types as they are written, where they differ.
    """

    def __init__(self, path: Path, collected: pa.Schema, stored: pa.Schema | None = None) -> None:
        self.path = path
        self.rows = 0
        self._collected = collected
        self._stored = stored or collected
        self._buffer: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row: column name → value."""
        self._buffer.append(row)
        self.rows += 1
        if len(self._buffer) >= ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        table = pa.Table.from_pylist(self._buffer, schema=self._collected).cast(self._stored)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self._stored, compression="zstd")
        self._writer.write_table(table)
        self._buffer.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()


def dumped(items: list[dict[str, Any]]) -> list[str]:
    """Dumps each item to JSON; floats keep every digit."""
    return [json.dumps(item, ensure_ascii=False) for item in items]


def holds_long_integer(value: Any) -> bool:
    """Whether a JSON value has an integer that 64 bits cannot hold; `datasets` cannot load a `Json()` with one."""
    if isinstance(value, dict | list):
        return any(map(holds_long_integer, value.values() if isinstance(value, dict) else value))
    return type(value) is int and not -(2**63) <= value < 2**64
