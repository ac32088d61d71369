"""Rollouts → what is worth training on, what is held out, and what is dropped, each with its reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.groups import tied_tasks
from gymtrl.rollouts.inputs import expand_inputs, require_rollouts
from gymtrl.rollouts.keys import completion_key
from gymtrl.rollouts.quality import default_threshold, measured, unfit
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.record import Line, Origin
from gymtrl.rollouts.sidecars import inputs_beside, load_sidecar
from gymtrl.rollouts.table import table_of, table_row
from gymtrl.workspace.artefact import Counts, artefact

from .settings import FilterSettings
from .split import Keys, hash_value, held_out_clusters, tied_clusters

TRAIN, VALIDATION, DROPPED = "train", "validation", "dropped"
HELD_OUT_INPUTS = "heldout_inputs.jsonl"

DROP_SENTENCES = {
    "reject": "the line is no rollout that can be learned from",
    "skip": "the line belongs to a file that Gym writes beside the rollouts",
    "context": "the model saw more than the row holds",
    "reward_missing": "the row has no reward",
    "reward_not_finite": "the reward is NaN or infinite",
    "masked": "the environment says that the reward is no valid measurement",
    "truncated": "the response is incomplete",
    "ends_in_reasoning": "the last turn has no answer",
    "unbalanced_think": "think tags in the text do not match",
    "below_threshold": "the reward is too low",
    "duplicate_completion": "the same completion of the same task is kept already",
    "over_cap": "enough completions of the task are kept already",
}


@dataclass(frozen=True)
class FilterResult:
    """What `filter_rollouts` did.

    Attributes:
        path (`Path`): The folder.
        train, validation (`int`): Rollouts in `train.jsonl` and `validation.jsonl`.
        dropped (`dict[str, int]`): Lines in `dropped.jsonl` by reason code.
        threshold (`float`): Lowest reward that was kept.
        threshold_why (`str`): Where it came from.
        tasks, clusters (`dict[str, int]`): Distinct ones on each side of the split (`train`, `validation`), those
            without a good rollout included.
        heldout_inputs (`int`): Input rows of held-out tasks in `heldout_inputs.jsonl`; 0 where no sidecar gave any.
    """

    path: Path
    train: int
    validation: int
    dropped: dict[str, int]
    threshold: float
    threshold_why: str
    tasks: dict[str, int]
    clusters: dict[str, int]
    heldout_inputs: int


class _Row(NamedTuple):
    """What the first pass remembers of a line."""

    origin: Origin
    columns: dict[str, Any]
    reason: str  # why it is dropped whatever the other rows are, or ""
    keys: Keys | None
    reward: float | None  # where it counts for the threshold
    completion: str


def filter_rollouts(inputs: Sequence[Path], out: Path, settings: FilterSettings) -> FilterResult:
    """Chooses rollouts and writes the filter folder.

    The folder holds `train.jsonl`, `validation.jsonl` and `dropped.jsonl` (together every non-blank input line, byte
    for byte), `table.parquet` (the rollout table with `split` and `drop_reason`), `heldout_inputs.jsonl` (input rows of
    all held-out tasks, where the run's materialized inputs give them) and `manifest.json`.

    Args:
        inputs (`Sequence[Path]`): Rollout files, or folders that hold them.
        out (`Path`): The folder to write.
        settings (`FilterSettings`): What is kept and what is held out.

    Returns:
        `FilterResult`: Counts and the threshold.

    Raises:
        `UserError`: If there is no rollout, no rule for the threshold, one task only, or nothing left to train on.
    """
    files = expand_inputs(inputs)
    rows = [_look(line, settings) for line in read_lines(files, cluster=settings.cluster)]
    require_rollouts(files, Counter(_verdict(row) for row in rows))
    threshold, why = _threshold(rows, settings)
    reasons = _reasons(rows, threshold, settings)
    dropped = Counter(reason for reason in reasons if reason)
    if all(reasons):
        raise _nothing_left(rows, dropped, 0, threshold, why)
    tied = tied_clusters(row.keys for row in rows if row.keys)
    held_out = held_out_clusters(tied, settings.validation, settings.split_salt)
    splits = [
        DROPPED if reason else VALIDATION if row.keys and row.keys.cluster_key in held_out else TRAIN
        for row, reason in zip(rows, reasons, strict=True)
    ]
    counts = Counter(splits)
    if not counts[TRAIN]:
        raise _nothing_left(rows, dropped, counts[VALIDATION], threshold, why)
    with artefact(out, verb="filter", settings=settings, inputs=files_read(files)) as draft:
        _write_lines(draft.path, rows, splits)
        table = table_of([row.columns for row in rows]).with_columns(
            split=pl.Series(splits, dtype=pl.String),
            drop_reason=pl.Series([reason or None for reason in reasons], dtype=pl.String),
        )
        table.write_parquet(draft.path / "table.parquet")
        heldout_inputs = _write_held_out_inputs(draft.path, files, rows, held_out, settings)
        result = FilterResult(
            path=out,
            train=counts[TRAIN],
            validation=counts[VALIDATION],
            dropped=dict(dropped.most_common()),
            threshold=threshold,
            threshold_why=why,
            tasks=_distinct(rows, held_out, "task_key"),
            clusters=_distinct(rows, held_out, "cluster_key"),
            heldout_inputs=heldout_inputs,
        )
        draft.counts = Counts(read=len(rows), written=result.train + result.validation, dropped=result.dropped)
        draft.extra["reward_threshold"] = threshold
        draft.extra["reward_threshold_why"] = why
        draft.extra["rollouts"] = {TRAIN: result.train, VALIDATION: result.validation}
        draft.extra["tasks"] = result.tasks
        draft.extra["clusters"] = result.clusters
        draft.extra["heldout_inputs"] = heldout_inputs
    return result


def drop_sentence(reason: str) -> str:
    """The words for a drop reason; the code of a verdict may follow a colon."""
    return DROP_SENTENCES[reason.partition(":")[0]]


def _look(line: Line, settings: FilterSettings) -> _Row:
    rollout = line.rollout
    verdict = f"{line.verdict}:{line.reason}"
    columns = table_row(line)
    if rollout is None:
        return _Row(line.origin, columns, verdict, None, None, "")
    if line.verdict == "context" and not settings.allow_partial_context:
        reason = verdict
    else:
        reason = unfit(rollout, keep_truncated=settings.keep_truncated)
    counts = measured(rollout) and reason != verdict
    return _Row(
        origin=line.origin,
        columns=columns,
        reason=reason,
        keys=Keys(rollout.cluster_key, rollout.task_key, rollout.input_key),
        reward=rollout.reward if counts else None,
        completion="" if reason else completion_key(rollout.completion),
    )


def _verdict(row: _Row) -> str:
    verdict, reason = row.columns["verdict"], row.columns["reason"]
    return f"{verdict}:{reason}" if reason else str(verdict)


def _threshold(rows: Iterable[_Row], settings: FilterSettings) -> tuple[float, str]:
    if settings.reward_threshold is not None:
        return settings.reward_threshold, "as set"
    rewards = {row.reward for row in rows if row.reward is not None}
    threshold, why = default_threshold(rewards)
    if threshold is not None:
        return threshold, why
    if rewards:
        raise UserError(why, remedy="pass --reward-threshold; gymtrl inspect shows how the rewards are distributed")
    return 0.0, why  # whatever it is, nothing passes, and the error that follows says why


def _reasons(rows: Sequence[_Row], threshold: float, settings: FilterSettings) -> list[str]:
    """For every row why it is dropped, or `""`."""
    reasons = []
    same_task = tied_tasks((row.keys.task_key, row.keys.input_key) for row in rows if row.keys)
    tasks: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        reason = row.reason
        if not reason and row.keys is not None and row.reward is not None:
            if row.reward < threshold:
                reason = "below_threshold"
            else:
                tasks[same_task[row.keys.task_key]].append(index)
        reasons.append(reason)
    for same in tasks.values():
        same.sort(key=lambda index: _preference(rows[index], settings.seed))
        kept: set[str] = set()
        for index in same:
            if rows[index].completion in kept:
                reasons[index] = "duplicate_completion"
            elif len(kept) == settings.max_per_task:
                reasons[index] = "over_cap"
            else:
                kept.add(rows[index].completion)
    return reasons


def _preference(row: _Row, seed: int) -> tuple[float, str, str, int]:
    """Highest reward first, then by a draw that depends on the bytes of the line and the seed alone."""
    draw = hashlib.sha256(f"{seed}:{row.origin.row_id}".encode()).hexdigest()
    return -(row.reward or 0.0), draw, row.origin.file, row.origin.line


def _distinct(rows: Iterable[_Row], held_out: set[str], field: str) -> dict[str, int]:
    sides: dict[str, set[str]] = {TRAIN: set(), VALIDATION: set()}
    for row in rows:
        if row.keys is not None:
            side = VALIDATION if row.keys.cluster_key in held_out else TRAIN
            sides[side].add(getattr(row.keys, field))
    return {side: len(keys) for side, keys in sides.items()}


def files_read(inputs: Sequence[Path]) -> list[Path]:
    """Every file that the result depends on: the rollout files and the materialized inputs beside them."""
    files = expand_inputs(inputs)
    sidecars = [inputs_beside(file) for file in files]
    return [*files, *(path for path in sidecars if path is not None)]


def _write_lines(folder: Path, rows: Sequence[_Row], splits: Sequence[str]) -> None:
    with ExitStack() as stack:
        targets = {
            split: stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in (TRAIN, VALIDATION, DROPPED)
        }
        for row, split in zip(rows, splits, strict=True):
            targets[split].write(read_bytes(row.origin) + b"\n")


def _write_held_out_inputs(
    folder: Path, files: Sequence[Path], rows: Sequence[_Row], held_out: set[str], settings: FilterSettings
) -> int:
    """Writes one input row for each held-out task that a sidecar knows; returns how many.

    A task without a single readable rollout is held out by the same rule, since a later round may bring one.
    """
    sides = {row.keys.input_key: row.keys.cluster_key in held_out for row in rows if row.keys and row.keys.input_key}
    clusters = {row.keys.cluster_key: row.keys.cluster_key in held_out for row in rows if row.keys}
    written: set[str] = set()
    with (folder / HELD_OUT_INPUTS).open("wb") as target:
        for file in files:
            sidecar = load_sidecar(file, settings.cluster)
            for asked in sidecar.rows.values():
                if asked.input_key in written:
                    continue
                side = sides.get(asked.input_key)
                if side is None:
                    cluster = asked.cluster_key or asked.input_key
                    side = clusters.get(cluster, hash_value(cluster, settings.split_salt) < settings.validation)
                if side:
                    written.add(asked.input_key)
                    target.write(json.dumps(sidecar.read(asked)).encode() + b"\n")
    if not written:
        (folder / HELD_OUT_INPUTS).unlink()
    return len(written)


def _nothing_left(
    rows: Sequence[_Row], dropped: Counter[str], validation: int, threshold: float, why: str
) -> UserError:
    table = "\n".join(f"  {count:>7}  {reason}: {drop_sentence(reason)}" for reason, count in dropped.most_common())
    rewards = [row.reward for row in rows if row.reward is not None]
    if validation:
        what = f"all {validation} rollouts that are good enough belong to held-out tasks: nothing is left to train on"
        remedy = "collect more, pass another --split-salt, or --validation 0"
    else:
        what = f"none of the {len(rows)} lines is worth training on"
        most = dropped.most_common(1)[0][0]
        if most == "below_threshold":
            remedy = (
                f"the threshold is {threshold:g} ({why}), the highest reward {max(rewards):g}: "
                "collect more rollouts, or lower --reward-threshold"
            )
        elif most == "reward_missing":
            remedy = "the rows carry no reward: collect with an environment that verifies, or let Gym verify them again"
        elif most.startswith("context:"):
            remedy = "--allow-partial-context keeps rollouts whose context is not complete"
        elif most == "truncated":
            remedy = "collect with a larger --max-output-tokens, or pass --keep-truncated"
        else:
            remedy = "gymtrl inspect shows file, line and cause of each"
    return UserError(f"{what}\n{table}", remedy=remedy)
