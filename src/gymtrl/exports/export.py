"""A dataset folder is written for another trainer.

Run as: gymtrl export DATASET -o FOLDER --to nemo-rl|openai|tokens
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from gymtrl.errors import UserError
from gymtrl.workspace.artefact import Counts, artefact

from . import nemo_rl, openai
from .settings import ExportSettings
from .source import PAIRED, SPLITS, Chat, Dropped, Pair, Source, chats, open_source, pairs
from .tokens import Shards, token_rows, token_schema

_PAIRS = {"nemo-rl": nemo_rl.preference_row, "openai": openai.preference_row}
_SCOPES = {"every": "every one of the assistant", "last": "the last; set sft.only_unmask_final=true in NeMo RL"}
_WITH_TOKENS = ("sft", "dpo", "kto", "grpo")


@dataclass(frozen=True)
class ExportResult:
    """What `export_dataset` wrote.

    Attributes:
        path (`Path`): The folder.
        counts (`Counts`): Rows of the dataset: read, written and dropped by reason.
        rows (`dict[str, int]`): Rows of the export by split; a pair counts twice where it became two rows.
    """

    path: Path
    counts: Counts
    rows: dict[str, int]


@dataclass
class _Tally:
    dropped_file: TextIO
    on_row: Callable[[], object] | None
    read: int = 0
    written: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)

    def drop(self, split: str, provenance: Mapping[str, Any], dropped: Dropped) -> None:
        self.dropped[dropped.reason] += 1
        _write_line(
            self.dropped_file, {**provenance, "split": split, "reason": dropped.reason, "detail": dropped.detail}
        )

    def next(self) -> None:
        self.read += 1
        if self.on_row is not None:
            self.on_row()


def export_dataset(
    dataset: Path, out: Path, settings: ExportSettings, *, on_row: Callable[[], object] | None = None
) -> ExportResult:
    """Writes a dataset folder for another trainer.

    Args:
        dataset (`Path`): Folder that `gymtrl format` wrote.
        out (`Path`): Folder to write: `train.jsonl` and `validation.jsonl`, or `data/` with Parquet shards; what could
            not be held goes to `dropped.jsonl` with its reason.
        settings (`ExportSettings`): The format.
        on_row (`Callable`, *optional*): Called without arguments after each row of the dataset; for a progress display.

    Returns:
        `ExportResult`: Counts; read = written + dropped.

    Raises:
        UserError: No such dataset, its objective has no place in the format, or no training row is left.
        RunError: The disk is full or not writable.
    """
    source = open_source(dataset)
    _refuse_objective(source, settings.to)
    with artefact(out, verb="export", settings=settings, inputs=[dataset]) as draft:
        scope: nemo_rl.Scope = "every"
        if settings.to == "nemo-rl" and source.objective == "sft":
            scope = nemo_rl.scope_of(chats(source, "train"))
            draft.extra["trained_messages"] = _SCOPES[scope]
        with (draft.path / "dropped.jsonl").open("w", encoding="utf-8") as dropped_file:
            tally = _Tally(dropped_file, on_row)
            for split in SPLITS:
                if settings.to == "tokens":
                    _write_tokens(source, split, draft.path, tally)
                else:
                    _write_chats(source, split, draft.path, settings.to, scope, tally)
        if not tally.rows["train"]:
            raise _nothing_left(dataset, tally)
        dropped = dict(sorted(tally.dropped.items()))
        draft.counts = Counts(read=tally.read, written=tally.written, dropped=dropped)
        result = ExportResult(out, draft.counts, dict(tally.rows))
        draft.extra.update({"objective": source.objective, "rows": result.rows, **tally.changed})
    return result


def _refuse_objective(source: Source, to: str) -> None:
    where = f"{source.path} is a dataset for {source.objective}"
    if to == "tokens":
        if source.objective not in _WITH_TOKENS:
            raise UserError(f"{where}: it has no loss mask", remedy="export it with --to nemo-rl or --to openai")
        if source.objective == "grpo" and "completion_ids" not in source.columns:
            raise UserError(f"{where} of prompts alone: it has no completions", remedy="train on it with TRL")
        if "images" in source.columns:
            raise UserError(f"{where} with images, which tokens alone do not hold", remedy="train on it with TRL")
    elif source.objective != "sft" and source.objective not in PAIRED:
        raise UserError(f"{where}, which {to} has no format for", remedy="export it with --to tokens")


def _write_chats(source: Source, split: str, folder: Path, to: str, scope: nemo_rl.Scope, tally: _Tally) -> None:
    if split not in source.files:
        return
    with ExitStack() as stack:
        lines = stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8"))
        beside = None
        if to == "openai":
            beside = stack.enter_context((folder / f"{split}_provenance.jsonl").open("w", encoding="utf-8"))
        for row, made in _converted(source, split, to, scope):
            if isinstance(made, Dropped):
                tally.drop(split, row.provenance, made)
            else:
                _write_line(lines, made)
                if beside is not None:
                    _write_line(beside, row.provenance)
                tally.written += 1
                tally.rows[split] += 1
                tally.changed.update(_changes(row))
            tally.next()


def _converted(
    source: Source, split: str, to: str, scope: nemo_rl.Scope
) -> Iterator[tuple[Chat | Pair, dict[str, Any] | Dropped]]:
    if source.objective in PAIRED:
        for pair in pairs(source, split):
            yield pair, _PAIRS[to](pair)
    else:
        for chat in chats(source, split):
            yield chat, nemo_rl.sft_row(chat, scope) if to == "nemo-rl" else openai.sft_row(chat)


def _changes(row: Chat | Pair) -> list[str]:
    """What the chat formats write in another way than the record."""
    found = []
    if any(message["role"] == "developer" for message in row.prompt):
        found.append("developer_as_system")
    if isinstance(row, Chat) and row.completion[-1]["role"] != "assistant":
        found.append("untrained_end_left_out")
    return found


def _write_tokens(source: Source, split: str, folder: Path, tally: _Tally) -> None:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    with Shards(data, split, token_schema(source)) as shards:
        for made in token_rows(source, split):
            shards.write(made)
            tally.written += 1
            tally.next()
        if shards.rows:
            tally.rows[split] = shards.rows


def _write_line(file: TextIO, value: Mapping[str, Any]) -> None:
    file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _nothing_left(dataset: Path, tally: _Tally) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common())
    return UserError(
        f"{dataset}: no training row is left of {tally.read}: {reasons}",
        remedy="'--to tokens' holds every row that has a loss mask; docs/export.md tells what each format cannot hold",
    )
