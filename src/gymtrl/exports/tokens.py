"""Rows as bare tokens: ids and loss masks in Parquet, for a trainer that brings no tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from .source import PAIR_PROVENANCE, ROW_PROVENANCE, Source, rows

IGNORED = -100

_ROWS_A_GROUP = 256
_ROWS_A_SHARD = 1 << 16

_TYPES = {
    "input_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.int8()),
    "row_id": pa.string(),
    "file": pa.string(),
    "line": pa.int64(),
    "task_key": pa.string(),
    "input_key": pa.string(),
    "cluster_key": pa.string(),
    "part": pa.int32(),
    "reward": pa.float64(),
    "label": pa.bool_(),
    "group": pa.string(),
    "log_probs": pa.list_(pa.float64()),
    "pair": pa.int64(),
    "side": pa.string(),
}
_COMMON = ("input_ids", "loss_mask", *ROW_PROVENANCE)
_MORE = {"sft": (), "dpo": ("pair", "side"), "kto": ("label",), "grpo": ("group", "log_probs")}
_CONTENT = {
    "sft": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask"),
    "kto": ("prompt_ids", "completion_ids", "completion_mask", "label"),
    "grpo": ("prompt_ids", "completion_ids", "completion_mask", "group", "log_probs"),
}


def token_schema(source: Source) -> pa.Schema:
    """Returns the columns of the shards of a dataset."""
    names = (*_COMMON, *_MORE[source.objective])
    return pa.schema([(name, _TYPES[name]) for name in names if name != "part" or name in source.columns])


def token_rows(source: Source, split: str) -> Iterator[list[dict[str, Any]]]:
    """Yields for each row of a split its rows of tokens.

    A pair becomes two rows with the same `pair`, its number within the split, of `side` `chosen` and `rejected`.
    """
    objective = source.objective
    named = PAIR_PROVENANCE if objective == "dpo" else ROW_PROVENANCE
    for number, row in enumerate(rows(source, split, [*_CONTENT[objective], *named])):
        if objective == "dpo":
            yield [_side(row, number, side) for side in ("chosen", "rejected")]
        else:
            yield [{name: row.get(name) for name in ROW_PROVENANCE} | _whole(row, objective)]


def _whole(row: Mapping[str, Any], objective: str) -> dict[str, Any]:
    if objective == "sft":
        return {"input_ids": row["input_ids"], "loss_mask": [int(label != IGNORED) for label in row["labels"]]}
    made = _joined(row["prompt_ids"], row["completion_ids"], row["completion_mask"])
    made |= {name: row[name] for name in _MORE[objective]}
    if made.get("log_probs") is not None:
        made["log_probs"] = [0.0] * len(row["prompt_ids"]) + row["log_probs"]
    return made


def _side(row: Mapping[str, Any], number: int, side: str) -> dict[str, Any]:
    origin = {name: row.get(f"{side}_{name}") for name in ("row_id", "file", "line", "reward")}
    keys = {name: row.get(name) for name in ("task_key", "input_key", "cluster_key")}
    tokens = _joined(row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_mask"])
    return {**origin, **keys, **tokens, "pair": number, "side": side}


def _joined(prompt: list[int], completion: list[int], mask: list[int]) -> dict[str, Any]:
    return {"input_ids": prompt + completion, "loss_mask": [0] * len(prompt) + mask}


class Shards:
    """The Parquet shards of a split, `SPLIT-00000.parquet` and on; no more than a row group is in memory.

    Args:
        folder (`Path`): Where to write; must exist.
        split (`str`): Name of the split.
        schema (`pa.Schema`): Types of the columns.
    """

    def __init__(self, folder: Path, split: str, schema: pa.Schema) -> None:
        self.rows = 0
        self._folder = folder
        self._split = split
        self._schema = schema
        self._buffer: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._shards = 0
        self._in_shard = 0

    def write(self, made: list[dict[str, Any]]) -> None:
        """Adds rows that belong together, which share a shard."""
        self._buffer += made
        self.rows += len(made)
        if len(self._buffer) >= _ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._writer is None or self._in_shard >= _ROWS_A_SHARD:
            self._close()
            path = self._folder / f"{self._split}-{self._shards:05d}.parquet"
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
            self._shards += 1
            self._in_shard = 0
        self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._in_shard += len(self._buffer)
        self._buffer.clear()

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
