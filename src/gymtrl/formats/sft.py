"""Rollouts become an SFT dataset folder that `datasets.load_dataset` and TRL's `SFTTrainer` take as it is.

Run as: gymtrl format sft FILTERED -o DATASET --model MODEL
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.formats import folder
from gymtrl.formats.checks import IGNORED, Refusal, Tokenized
from gymtrl.formats.dataset import DROPPED_SCHEMA, ParquetRows, dumped, holds_long_integer, sft_schema
from gymtrl.formats.masks import tokenize
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.templates import ModelTemplate, model_template, to_chat
from gymtrl.models.fingerprint import file_hashes, fingerprint, load_config, load_tokenizer, local_folder
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Line, Rollout
from gymtrl.rollouts.sidecars import inputs_beside
from gymtrl.workspace.artefact import Counts, artefact, sha256_of

SPLITS = ("train", "validation")

_TOKEN_FILES = ("*.json", "*.jinja", "*.model", "*.txt")

_IDENTITY = ("file", "line", "task_key", "input_key", "cluster_key")


@dataclass(frozen=True)
class FormatResult:
    """What `format_sft` wrote.

    Attributes:
        path (`Path`): The dataset folder.
        counts (`Counts`): Rows read, written and dropped by reason.
        rows (`dict[str, int]`): Rows by split.
        tokens, loss_tokens (`int`): Over both splits; the second counts the tokens that carry loss.
        longest (`int`): Tokens of the longest row.
        routes (`dict[str, int]`): Rows by the way their tokens came about.
        flags (`dict[str, int]`): Rows by remark.
    """

    path: Path
    counts: Counts
    rows: dict[str, int]
    tokens: int
    loss_tokens: int
    longest: int
    routes: dict[str, int]
    flags: dict[str, int]


@dataclass
class _Tally:
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0


def format_inputs(source: Path, settings: FormatSftSettings) -> list[Path]:
    """Every file and folder that the dataset of `source` depends on.

    Args:
        source (`Path`): As `format_sft` takes it.
        settings (`FormatSftSettings`): Name the model.

    Returns:
        `list[Path]`: The source; of a rollout file the materialized inputs beside it; of a local model the files that
            decide tokens.

    Raises:
        UserError: The source or the model's folder is missing.
    """
    _split_files(source)
    sidecar = None if source.is_dir() else inputs_beside(source)
    model = local_folder(settings.model)
    deciding = {path for pattern in _TOKEN_FILES for path in model.glob(pattern)} if model is not None else ()
    return [source, *([sidecar] if sidecar is not None else []), *sorted(path for path in deciding if path.is_file())]


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
    files = _split_files(source)
    template = model_template(load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code))
    limit = _limit(settings)
    collected, stored = sft_schema()
    tally = _Tally()
    with artefact(out, verb="format sft", settings=settings, inputs=format_inputs(source, settings)) as draft:
        data = draft.path / "data"
        data.mkdir()
        paths = {split: data / f"{split}-00000-of-00001.parquet" for split in SPLITS}
        with ExitStack() as stack:
            writers = {s: stack.enter_context(ParquetRows(paths[s], collected, stored)) for s in SPLITS}
            dropped = stack.enter_context(ParquetRows(draft.path / "dropped.parquet", DROPPED_SCHEMA))
            origins = _recorded_identity(source)
            for split, line in _lines(files):
                known = origins.get((split, line.origin.row_id))
                identity = _identity(line, known.popleft() if known else {})
                row = _row(line, identity, template, settings, limit, partial_context=source.is_dir())
                tally.read += 1
                if isinstance(row, Refusal):
                    tally.dropped[row.reason] += 1
                    where = {"row_id": line.origin.row_id, "file": identity["file"], "line": identity["line"]}
                    dropped.write({**where, "split": split, "reason": row.reason, "detail": row.detail})
                else:
                    _count(tally, row)
                    writers[split].write(row)
                if on_row is not None:
                    on_row()
        rows = {split: writer.rows for split, writer in writers.items()}
        if not rows["train"]:
            raise _nothing_left(source, tally)
        draft.counts = Counts(read=tally.read, written=sum(rows.values()), dropped=dict(sorted(tally.dropped.items())))
        result = FormatResult(
            path=out,
            counts=draft.counts,
            rows=rows,
            tokens=tally.tokens,
            loss_tokens=tally.loss_tokens,
            longest=tally.longest,
            routes=dict(tally.routes),
            flags=dict(tally.flags),
        )
        facts = {
            "model": settings.model,
            "fingerprint": fingerprint(template.tokenizer).as_dict(),
            "tokenizer_files": file_hashes(settings.model),
            "rows": rows,
            "tokens": tally.tokens,
            "loss_tokens": tally.loss_tokens,
            "longest": tally.longest,
            "routes": result.routes,
            "flags": result.flags,
        }
        folder.write_script(draft.path, settings)
        folder.write_card(draft.path, result, settings, source_sha256=sha256_of(source))
        facts["files"] = {str(p.relative_to(draft.path)): sha256_of(p) for p in paths.values() if p.is_file()}
        draft.extra.update(facts)
    return result


def _split_files(source: Path) -> dict[str, Path]:
    if source.is_dir():
        files = {split: source / f"{split}.jsonl" for split in SPLITS}
        if not files["train"].is_file():
            raise UserError(
                f"{source} holds no train.jsonl", remedy="give the folder that 'gymtrl filter' wrote, or a rollout file"
            )
        return {split: path for split, path in files.items() if path.is_file()}
    if not source.is_file():
        raise UserError(
            f"{source} does not exist", remedy="give the folder that 'gymtrl filter' wrote, or a rollout file"
        )
    return {"train": source}


def _lines(files: Mapping[str, Path]) -> Iterator[tuple[str, Line]]:
    for split, path in files.items():
        if path.stat().st_size:
            for line in read_lines([path]):
                yield split, line


def _limit(settings: FormatSftSettings) -> int | None:
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (settings.max_length, context) if isinstance(limit, int)]
    return min(limits, default=None)


def _recorded_identity(source: Path) -> dict[tuple[str, str], deque[dict[str, Any]]]:
    """Reads where the rows of a filter folder came from, and their keys, which a sidecar or the user may have given.

    Returns:
        `dict`: By split and row id; lines with the same bytes stand in a queue, in the order of the split's file.
    """
    table = source / "table.parquet"
    if not (source.is_dir() and table.is_file()):
        return {}
    columns = pq.read_schema(table).names
    if not {"row_id", "split"} <= set(columns):
        return {}
    wanted = ["row_id", "split", *(name for name in _IDENTITY if name in columns)]
    found: defaultdict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
    for row in pq.read_table(table, columns=wanted).to_pylist():
        found[row.pop("split"), row.pop("row_id")].append(row)
    return dict(found)


def _identity(line: Line, known: Mapping[str, Any]) -> dict[str, Any]:
    rollout = line.rollout
    identity: dict[str, Any] = {"file": line.origin.file, "line": line.origin.line}
    if rollout is not None:
        identity |= {
            "task_key": rollout.task_key,
            "input_key": rollout.input_key,
            "cluster_key": rollout.cluster_key,
        }
    return identity | {k: v for k, v in known.items() if v is not None}


def _row(
    line: Line,
    identity: Mapping[str, Any],
    template: ModelTemplate,
    settings: FormatSftSettings,
    limit: int | None,
    *,
    partial_context: bool,
) -> dict[str, Any] | Refusal:
    # A filter folder holds rows of partial context only where the user asked for them.
    if line.rollout is None or (line.verdict != "ok" and not partial_context):
        return Refusal(f"{line.verdict}:{line.reason}" if line.reason else line.verdict, line.detail)
    rollout = line.rollout
    arguments = [call.arguments for message in (*rollout.prompt, *rollout.completion) for call in message.tool_calls]
    if holds_long_integer([arguments, *rollout.tools]):
        return Refusal("integer_beyond_64_bits", "an integer in a tool or a call that datasets cannot load")
    tokens = tokenize(rollout, template, use_recorded=settings.use_recorded_ids == "auto")
    if isinstance(tokens, Refusal):
        return tokens
    if limit is not None and len(tokens.input_ids) > limit:
        return Refusal("too_long", f"{len(tokens.input_ids)} tokens, {limit} fit")
    return {
        "row_id": rollout.origin.row_id,
        **identity,
        "reward": rollout.reward,
        **_messages(rollout),
        **_tokens(tokens),
    }


def _messages(rollout: Rollout) -> dict[str, Any]:
    prompt, completion, tools = to_chat(rollout.prompt), to_chat(rollout.completion), list(rollout.tools)
    record = {"prompt": prompt, "completion": completion, "tools": tools}
    return {
        "record_json": json.dumps(record, ensure_ascii=False),
        "prompt": dumped(prompt),
        "completion": dumped(completion),
        "tools": dumped(tools),
    }


def _tokens(tokens: Tokenized) -> dict[str, Any]:
    return {
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "route": tokens.route,
        "flags": list(tokens.flags),
    }


def _count(tally: _Tally, row: Mapping[str, Any]) -> None:
    tally.routes[row["route"]] += 1
    tally.flags.update(row["flags"])
    tally.tokens += len(row["input_ids"])
    tally.loss_tokens += sum(label != IGNORED for label in row["labels"])
    tally.longest = max(tally.longest, len(row["input_ids"]))


_REMEDIES = {
    "template_without_tools": "choose a model whose chat template knows tools",
    "too_long": "raise max_length, or choose a model with a longer context",
    "reasoning_lost": "choose a model whose chat template keeps reasoning",
    "template_not_prefix_preserving": "choose a model whose chat template TRL knows, or record token ids in Gym",
    "images_in_text_model": "this verb trains text models; filter for rows without images",
    "truncated": "collect again with a higher limit of output tokens",
}


def _nothing_left(source: Path, tally: _Tally) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common()) or "the file is empty"
    commonest = next((reason for reason, _ in tally.dropped.most_common()), "")
    return UserError(
        f"{source}: no training row is left of {tally.read} lines: {reasons}",
        remedy=_REMEDIES.get(commonest, "look at the rollouts with 'gymtrl inspect'"),
    )
