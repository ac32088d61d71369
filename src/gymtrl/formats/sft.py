"""Rollouts become an SFT dataset folder that `datasets.load_dataset` and TRL's `SFTTrainer` take as it is.

Run as: gymtrl format sft FILTERED -o DATASET --model MODEL
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from gymtrl.formats.chats import in_parts, to_chat
from gymtrl.formats.checks import IGNORED, Refusal
from gymtrl.formats.dataset import Objective, as_view, dumped, record_of
from gymtrl.formats.example import Example, holds_images
from gymtrl.formats.folder import DatasetDraft, FormatResult, dataset_folder
from gymtrl.formats.images import has_processor, load_processor, read_images
from gymtrl.formats.rows import Row, rows_of
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.source import SourceLine, longest_row, source_lines
from gymtrl.formats.templates import ModelTemplate, model_template
from gymtrl.models.fingerprint import load_tokenizer

_BATCH = 64
"""Lines whose texts are tokenized together."""


def format_sft(
    source: Path, out: Path, settings: FormatSftSettings, *, on_row: Callable[[], object] | None = None
) -> FormatResult:
    """Writes the SFT dataset of `source` for one model.

    Args:
        source (`Path`): A filter folder (`train.jsonl` and, where there is one, `validation.jsonl`), or a rollout file,
            whose sound rows all become training rows.
        out (`Path`): Dataset folder to write.
        settings (`FormatSftSettings`): Model, length limit and route.
        on_row (`Callable`, *optional*): Called without arguments after each line of the source, whether its row is
            written or dropped; for a progress display.

    Returns:
        `FormatResult`: Counts; read = written + dropped.

    Raises:
        UserError: The source or the model is missing, the model has no chat template, or no training row is left.
        RunError: The disk is full or not writable.
    """
    template = _template(source, settings)
    limit = longest_row(settings)
    lines = source_lines(source)
    objective: Objective = "sft" if template.processor is None else "sft_images"
    with dataset_folder(source, out, "format sft", objective, settings, template) as draft:
        while batch := list(islice(lines, _BATCH)):
            for line, rows in _made(batch, template, settings, limit, partial_context=source.is_dir()):
                _put(draft, line, rows)
                if on_row is not None:
                    on_row()
    assert draft.result is not None
    return draft.result


def _template(source: Path, settings: FormatSftSettings) -> ModelTemplate:
    """Of the model; with its processor where it has one and there are images for it."""
    trust = settings.trust_remote_code
    tokenizer = load_tokenizer(settings.model, trust_remote_code=trust)
    if has_processor(settings.model) and any(
        line.line.rollout is not None and holds_images(line.line.rollout) for line in source_lines(source)
    ):
        processor = load_processor(settings.model, trust_remote_code=trust)
        if processor is not None:
            return model_template(processor.tokenizer, processor)
    return model_template(tokenizer)


def _made(
    batch: list[SourceLine],
    template: ModelTemplate,
    settings: FormatSftSettings,
    limit: int | None,
    *,
    partial_context: bool,
) -> Iterator[tuple[SourceLine, list[Row] | Refusal]]:
    refusals = [unusable(line, partial_context=partial_context) for line in batch]
    rollouts = [line.line.rollout for line, refusal in zip(batch, refusals, strict=True) if refusal is None]
    made = iter(
        rows_of(
            [rollout for rollout in rollouts if rollout is not None],
            template,
            reasoning=settings.reasoning,
            use_recorded=settings.use_recorded_ids == "auto",
        )
    )
    for line, refusal in zip(batch, refusals, strict=True):
        rows = refusal or next(made)
        if isinstance(rows, list):
            longest = max(len(row.tokens.input_ids) for row in rows)
            if limit is not None and longest > limit:
                rows = Refusal("too_long", f"{longest} tokens, {limit} fit")
        yield line, rows


def unusable(line: SourceLine, *, partial_context: bool) -> Refusal | None:
    """Why a line cannot become rows whatever the model; `None` where it can.

    Args:
        line (`SourceLine`): As read.
        partial_context (`bool`): Rows whose context is incomplete are wanted: a filter folder holds them only where the
            user asked for them.
    """
    told, rollout = line.line, line.line.rollout
    if rollout is None or (told.verdict != "ok" and not partial_context):
        return Refusal(f"{told.verdict}:{told.reason}" if told.reason else told.verdict, told.detail)
    return None


def _put(draft: DatasetDraft, line: SourceLine, rows: list[Row] | Refusal) -> None:
    if isinstance(rows, Refusal):
        draft.drop(line.split, line.identity, rows)
        return
    assert line.line.rollout is not None
    draft.use()
    for part, row in enumerate(rows):
        tokens = row.tokens
        draft.write(
            line.split,
            {
                **asdict(line.identity),
                "reward": line.line.rollout.reward,
                "part": part,
                "route": tokens.route,
                "flags": list(tokens.flags),
                **messages(row.example),
                **_shown(row),
                "input_ids": tokens.input_ids,
                "labels": tokens.labels,
            },
            routes=[tokens.route],
            lengths=[len(tokens.input_ids)],
            loss_tokens=len(tokens.labels) - tokens.labels.count(IGNORED),
        )


def _shown(row: Row) -> dict[str, Any]:
    """What a processor takes, where the model has one."""
    if row.tokens.text is None:
        return {}
    files = read_images(row.example.messages)
    assert isinstance(files, list), files.reason
    return {"images": [{"bytes": data, "path": None} for data in files], "text": row.tokens.text}


def messages(example: Example) -> dict[str, Any]:
    """The columns that hold an example's messages: exactly, and as the view that people and plain scripts take."""
    chats = {"prompt": to_chat(example.prompt), "completion": to_chat(example.completion)}
    if holds_images(example):
        chats = {name: in_parts(chat) for name, chat in chats.items()}
    parts = {name: dumped(items) for name, items in {**chats, "tools": list(example.tools)}.items()}
    return {"record_json": record_of(parts), **{name: as_view(items) for name, items in parts.items()}}
