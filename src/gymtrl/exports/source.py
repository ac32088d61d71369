"""A dataset folder as an export reads it: row by row, from the exact record and not from the view for `datasets`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.workspace.artefact import read_manifest

SPLITS = ("train", "validation")
PAIRED = ("dpo", "reward")

_KEYS = ("task_key", "input_key", "cluster_key")
ROW_PROVENANCE = ("row_id", "file", "line", *_KEYS, "part", "reward")
PAIR_PROVENANCE = (
    *_KEYS,
    *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("row_id", "file", "line", "reward")),
    "kind",
    "depth",
)
_ROWS_AT_ONCE = 64

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A dataset folder.

    Attributes:
        path (`Path`): The folder.
        objective (`str`): What it was made for: `sft`, `dpo`, `reward`, `kto` or `grpo`.
        reasoning (`bool`): Reasoning belongs to its rows. Records hold it also where the dataset was made without.
        columns (`frozenset[str]`): Of its Parquet files.
        files (`dict[str, tuple[Path, ...]]`): The Parquet files of each split that has rows.
    """

    path: Path
    objective: str
    reasoning: bool
    columns: frozenset[str]
    files: dict[str, tuple[Path, ...]]


@dataclass(frozen=True)
class Chat:
    """A row with one completion.

    Attributes:
        prompt, completion (`list[dict]`): Messages as chat templates take them.
        tools (`list[dict]`): As `{"type": "function", "function": {...}}`.
        provenance (`dict[str, Any]`): Keys and place of the rollout.
    """

    prompt: Messages
    completion: Messages
    tools: list[dict[str, Any]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A row with a better and a worse completion.

    Attributes:
        prompt, chosen, rejected (`list[dict]`): Messages as chat templates take them.
        tools (`list[dict]`): As `{"type": "function", "function": {...}}`.
        provenance (`dict[str, Any]`): Keys, places and rewards of the two rollouts.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    tools: list[dict[str, Any]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """A row that a format cannot hold.

    Attributes:
        reason (`str`): Reason code.
        detail (`str`): What was found, in words.
    """

    reason: str
    detail: str


def open_source(dataset: Path) -> Source:
    """Reads what a dataset folder holds.

    Raises:
        UserError: No such folder, no dataset, or no training rows in it.
    """
    manifest = read_manifest(dataset)
    verb, _, objective = manifest.verb.partition(" ")
    if verb != "format":
        raise UserError(f"{dataset} is no dataset: '{verb}' wrote it", remedy="give the folder that 'format' wrote")
    found = {split: tuple(sorted((dataset / "data").glob(f"{split}-*.parquet"))) for split in SPLITS}
    if not found["train"]:
        raise UserError(f"{dataset} holds no training rows", remedy="run 'gymtrl format' again")
    columns = frozenset(pq.read_schema(found["train"][0]).names)
    reasoning = manifest.settings.get("reasoning") != "drop"
    return Source(dataset, objective, reasoning, columns, {split: files for split, files in found.items() if files})


def chats(source: Source, split: str) -> Iterator[Chat]:
    """Yields the rows of a split, whose dataset has one completion a row."""
    for row in rows(source, split, ["record_json", *ROW_PROVENANCE]):
        record = _record(source, row)
        yield Chat(record["prompt"], record["completion"], record["tools"], provenance(row, ROW_PROVENANCE))


def pairs(source: Source, split: str) -> Iterator[Pair]:
    """Yields the rows of a split, whose dataset has two completions a row."""
    for row in rows(source, split, ["record_json", *PAIR_PROVENANCE]):
        record = _record(source, row)
        sides = record["chosen"], record["rejected"]
        yield Pair(record["prompt"], *sides, record["tools"], provenance(row, PAIR_PROVENANCE))


def _record(source: Source, row: Mapping[str, Any]) -> dict[str, Messages]:
    record: dict[str, Messages] = json.loads(row["record_json"])
    if not source.reasoning:
        for name in record.keys() - {"tools"}:
            record[name] = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in record[name]]
    return record


def rows(source: Source, split: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split with those of `columns` that the dataset has; few are in memory at once."""
    wanted = [name for name in columns if name in source.columns]
    for path in source.files.get(split, ()):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
            yield from batch.to_pylist()


def provenance(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Picks what tells where a row came from; a reward that JSON cannot hold becomes null."""
    picked = {name: row[name] for name in names if name in row}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in picked.items()}


def developer_as_system(messages: Messages) -> Messages:
    """Writes `system` for `developer`, which many chat templates and services do not know."""
    return [message | {"role": "system"} if message["role"] == "developer" else message for message in messages]


def to_last_assistant(completion: Messages) -> Messages:
    """Leaves out what follows the last assistant message: nothing that is trained comes after it."""
    last = max(place for place, message in enumerate(completion) if message["role"] == "assistant")
    return completion[: last + 1]


def needs_images(messages: Messages) -> bool:
    """Whether a message holds images, whose bytes the record does not hold."""
    return any(not isinstance(message.get("content") or "", str) for message in messages)
