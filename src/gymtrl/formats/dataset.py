"""The Parquet files of a dataset folder: their columns, and how rows are written a few at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

Objective = Literal["sft", "sft_images", "dpo", "reward", "kto", "grpo_prompts", "grpo_groups"]

ROWS_A_GROUP = 256
BYTES_A_GROUP = 64_000_000
"""Roughly; memory must not grow with the rows' length, and Arrow reads no more than 2 GB of a nested column at once."""

_LONG = re.compile(r"\d{19}")
_encode = msgspec.json.Encoder().encode

BYTES_A_SHARD = 500_000_000
"""About how large a file gets before the next one begins; the hub's own size for shards."""

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

_IDENTITY = {
    "row_id": "text",
    "file": "text",
    "line": "whole",
    "task_key": "text",
    "input_key": "text",
    "cluster_key": "text",
}
_TASK = {"task_key": "text", "input_key": "text", "cluster_key": "text"}
_PAIR = {
    **_TASK,
    **{
        f"{side}_{name}": kind
        for side in ("chosen", "rejected")
        for name, kind in (("row_id", "text"), ("file", "text"), ("line", "whole"), ("reward", "number"))
    },
    "kind": "text",
    "depth": "small",
    "chosen_route": "text",
    "rejected_route": "text",
    "flags": "texts",
    "record_json": "text",
    "prompt": "view",
    "chosen": "view",
    "rejected": "view",
    "tools": "view",
}
_MADE = {"route": "text", "flags": "texts", "record_json": "text", "prompt": "view", "completion": "view"}

COLUMNS: dict[Objective, dict[str, str]] = {
    "sft": {
        **_IDENTITY,
        "reward": "number",
        "part": "small",
        **_MADE,
        "tools": "view",
        "input_ids": "ids",
        "labels": "ids",
    },
    "sft_images": {
        **_IDENTITY,
        "reward": "number",
        "part": "small",
        **_MADE,
        "tools": "view",
        "images": "images",
        "text": "text",
        "input_ids": "ids",
        "labels": "ids",
    },
    "dpo": {
        **_PAIR,
        "prompt_ids": "ids",
        "chosen_ids": "ids",
        "rejected_ids": "ids",
        "chosen_mask": "mask",
        "rejected_mask": "mask",
    },
    "reward": {**_PAIR, "chosen_ids": "ids", "rejected_ids": "ids"},
    "kto": {
        **_IDENTITY,
        "reward": "number",
        "label": "truth",
        **_MADE,
        "tools": "view",
        "prompt_ids": "ids",
        "completion_ids": "ids",
        "completion_mask": "mask",
    },
    "grpo_prompts": {
        **_TASK,
        "file": "text",
        "line": "whole",
        "pass_rate": "number",
        "rollouts": "small",
        "record_json": "text",
        "prompt": "view",
        "tools": "view",
        "prompt_ids": "ids",
    },
    "grpo_groups": {
        **_IDENTITY,
        "group": "text",
        "reward": "number",
        **_MADE,
        "tools": "view",
        "prompt_ids": "ids",
        "completion_ids": "ids",
        "completion_mask": "mask",
        "log_probs": "numbers",
    },
}
"""Columns of each dataset and the kind of each."""


def schemas(objective: Objective) -> tuple[pa.Schema, pa.Schema]:
    """Returns the columns of a dataset: as they are collected, and as they are stored.

    They differ in the view columns, which hold dumped JSON and are stored as `datasets` stores `List(Json())`. Dumping
    them here keeps floats and keys with null, both of which `datasets` would change if it got objects.
    """
    from datasets import Features, Image, Json, List, Value

    kinds = {
        "text": Value("string"),
        "texts": List(Value("string")),
        "whole": Value("int64"),
        "small": Value("int32"),
        "number": Value("float64"),
        "numbers": List(Value("float64")),
        "truth": Value("bool"),
        "view": List(Json()),
        "ids": List(Value("int32")),
        "mask": List(Value("int8")),
        "images": List(Image()),
    }
    columns = COLUMNS[objective]
    stored = Features({name: kinds[kind] for name, kind in columns.items()}).arrow_schema
    views = [name for name, kind in columns.items() if kind == "view"]
    collected = pa.schema(
        [pa.field(field.name, pa.list_(pa.string())) if field.name in views else field for field in stored]
    )
    return collected, stored


class ParquetRows:
    """Parquet files that take one row at a time and hold no more than a row group in memory.

    Files appear with their first row, so an empty split leaves none. They are called NAME-00000-of-00002.parquet, or
    where the folder is to have one file only NAME.parquet.

    Args:
        folder (`Path`): Where to write; it must exist.
        name (`str`): What the files are called after.
        collected (`pa.Schema`): Types of the rows as they are given.
        stored (`pa.Schema`, *optional*): Types as they are written, where they differ.
        numbered (`bool`, *optional*, defaults to `True`): Several files where there is much.
    """

    def __init__(
        self, folder: Path, name: str, collected: pa.Schema, stored: pa.Schema | None = None, *, numbered: bool = True
    ) -> None:
        self.rows = 0
        self.files: list[Path] = []
        self._folder, self._name, self._numbered = folder, name, numbered
        self._collected = collected
        self._stored = stored or collected
        self._buffer: list[dict[str, Any]] = []
        self._size = 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row: column name → value."""
        self._buffer.append(row)
        self.rows += 1
        self._size += sum(_size(value) for value in row.values())
        if len(self._buffer) >= ROWS_A_GROUP or self._size >= BYTES_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        table = pa.Table.from_pylist(self._buffer, schema=self._collected).cast(self._stored)
        if self._writer is None:
            number = f"-{len(self.files):05d}" if self._numbered else ""
            self.files.append(self._folder / f"{self._name}{number}.parquet")
            self._writer = pq.ParquetWriter(self.files[-1], self._stored, compression="zstd")
        self._writer.write_table(table)
        self._buffer.clear()
        self._size = 0
        if self._numbered and self.files[-1].stat().st_size > BYTES_A_SHARD:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            self._close()
        if kind is None and self._numbered:
            total = len(self.files)
            self.files = [file.rename(file.with_stem(f"{file.stem}-of-{total:05d}")) for file in self.files]


def _size(value: Any) -> int:
    """Bytes that a value takes, roughly."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return 8 * len(value) if value and isinstance(value[0], int | float) else sum(map(_size, value))
    return 8


def dumped(items: list[dict[str, Any]]) -> list[str]:
    """Dumps each item to JSON; numbers keep every digit."""
    return [_encode(item).decode() for item in items]


def record_of(parts: Mapping[str, list[str]]) -> str:
    """A JSON object of lists whose items are dumped already."""
    return "{" + ", ".join(f'"{name}": [{", ".join(items)}]' for name, items in parts.items()) + "}"


def as_view(items: list[str]) -> list[str]:
    """Dumped items as `datasets` can load them in a `Json()` column: integers beyond 64 bits become their digits."""
    return [_encode(_as_digits(msgspec.json.decode(item))).decode() if _LONG.search(item) else item for item in items]


def _as_digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_digits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_digits(inner) for inner in value]
    return str(value) if type(value) is int and not -(2**63) <= value < 2**64 else value
