"""Rollouts → what is worth training on, what is held out, and what is dropped, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.sidecars import load_sidecar
from gymtrl.workspace.artefact import Counts, artefact

from .choice import choose, find_threshold, require_threshold
from .clusters import count_unnamed
from .lines import PLACE, Placed, copy_lines
from .overlaps import Overlapping, contaminated_rows
from .rules import drop_sentence
from .settings import FilterSettings
from .source import Source, dotted_cluster, files_read, open_source
from .split import hash_value, held_out_clusters, table_clusters

TRAIN, VALIDATION, DROPPED = "train", "validation", "dropped"
HELD_OUT_INPUTS = "heldout_inputs.jsonl"
CONTAMINATED_ROWS = "contaminated.jsonl"
_PART = 25_000

__all__ = ["FilterResult", "drop_sentence", "files_read", "filter_rollouts"]


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
        contaminated_tasks (`int`): Tasks that a benchmark holds as well.
        tasks_without_cluster (`int`): Tasks that the cluster file does not name.
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
    contaminated_tasks: int = 0
    tasks_without_cluster: int = 0


def filter_rollouts(
    inputs: Sequence[Path],
    out: Path,
    settings: FilterSettings,
    *,
    on_bytes: Callable[[int], object] | None = None,
) -> FilterResult:
    """Chooses rollouts and writes the filter folder.

    The folder holds `train.jsonl`, `validation.jsonl` and `dropped.jsonl` (together every non-blank input line, byte
    for byte), `table.parquet` (the rollout table with `split` and `drop_reason`), `heldout_inputs.jsonl` (input rows of
    all held-out tasks, where the run's materialized inputs give them), `contaminated.jsonl` (what overlaps with the
    benchmarks, where some are named) and `manifest.json`.

    Args:
        inputs (`Sequence[Path]`): Rollout files, folders that hold them, or one rollout table that
            `gymtrl inspect --table` wrote; then no rollout file is parsed, and lines are copied by their place.
        out (`Path`): The folder to write.
        settings (`FilterSettings`): What is kept and what is held out.
        on_bytes (`Callable[[int], object]`, *optional*): Called with the number of bytes read since the last call, for
            a progress display.

    Returns:
        `FilterResult`: Counts and the threshold.

    Raises:
        `UserError`: If there is no rollout, no rule for the threshold, one task only, or nothing left to train on; if
            the table's files have changed, or a setting names what is not there.
    """
    with TemporaryDirectory(prefix="gymtrl-") as work:
        source = open_source(inputs, Path(work), settings, on_bytes)
        decision = _decide(source, settings)
        with artefact(out, verb="filter", settings=settings, inputs=files_read(inputs, settings)) as draft:
            heldout_inputs = _write(draft.path, source, decision, settings)
            counts = _counted(decision.splits)
            result = FilterResult(
                path=out,
                train=counts[TRAIN],
                validation=counts.get(VALIDATION, 0),
                dropped=_counted(decision.reasons),
                threshold=decision.threshold,
                threshold_why=decision.threshold_why,
                tasks=_distinct(source.rows, decision.is_held_out, "task_key"),
                clusters=_distinct(source.rows, decision.is_held_out, "cluster_key"),
                heldout_inputs=heldout_inputs,
                contaminated_tasks=len(decision.overlapping),
                tasks_without_cluster=count_unnamed(source.rows, source.clusters) if source.clusters else 0,
            )
            kept = result.train + result.validation
            draft.counts = Counts(read=len(decision.reasons), written=kept, dropped=result.dropped)
            draft.extra.update(_facts(result, settings, source))
    return result


@dataclass(frozen=True)
class _Decision:
    """What becomes of each row: why it is dropped (null where it is not), and where it goes."""

    reasons: pl.Series
    splits: pl.Series
    held_out: set[str]
    is_held_out: pl.Series
    threshold: float
    threshold_why: str
    overlapping: Mapping[str, Overlapping]


def _decide(source: Source, settings: FilterSettings) -> _Decision:
    found = find_threshold(source.rows, settings)
    threshold, why = require_threshold(found)
    choice = choose(source.rows, settings)
    reasons = choice.at(threshold)
    dropped = _counted(reasons)
    if sum(dropped.values()) == len(reasons):
        raise _nothing_left(len(reasons), dropped, 0, threshold, why, found[2])
    held_out = held_out_clusters(table_clusters(source.rows), settings.validation, settings.split_salt)
    inside = pl.col("cluster_key").is_in(list(held_out)).fill_null(False)
    is_held_out = source.rows.select(inside).collect().to_series()
    splits = _splits(reasons, is_held_out)
    counts = _counted(splits)
    if TRAIN not in counts:
        raise _nothing_left(len(reasons), dropped, counts[VALIDATION], threshold, why, found[2])
    return _Decision(reasons, splits, held_out, is_held_out, threshold, why, choice.overlapping)


def _write(folder: Path, source: Source, decision: _Decision, settings: FilterSettings) -> int:
    """Writes everything but the manifest; returns the number of held-out inputs."""
    _write_lines(folder, source.rows, decision.splits)
    _write_table(folder / "table.parquet", source.rows, decision)
    if settings.benchmark is not None:
        with (folder / CONTAMINATED_ROWS).open("w", encoding="utf-8") as target:
            for row in contaminated_rows(source.rows, decision.reasons, decision.overlapping):
                target.write(json.dumps(row) + "\n")
    return _write_held_out_inputs(folder, source, decision.held_out, settings)


def _facts(result: FilterResult, settings: FilterSettings, source: Source) -> dict[str, object]:
    facts: dict[str, object] = {
        "reward_threshold": result.threshold,
        "reward_threshold_why": result.threshold_why,
        "rollouts": {TRAIN: result.train, VALIDATION: result.validation},
        "tasks": result.tasks,
        "clusters": result.clusters,
        "heldout_inputs": result.heldout_inputs,
    }
    if settings.benchmark is not None:
        facts["contaminated_tasks"] = result.contaminated_tasks
    if source.clusters:
        facts["tasks_without_cluster"] = result.tasks_without_cluster
    return facts


def _counted(values: pl.Series) -> dict[str, int]:
    """How often each value occurs, most frequent first; nulls are not counted."""
    counted = values.drop_nulls().alias("value").value_counts().sort("count", "value", descending=[True, False])
    return dict(counted.iter_rows())


def _splits(reasons: pl.Series, is_held_out: pl.Series) -> pl.Series:
    kept = pl.when("held_out").then(pl.lit(VALIDATION)).otherwise(pl.lit(TRAIN))
    split = pl.when(pl.col("reason").is_null()).then(kept).otherwise(pl.lit(DROPPED))
    return (
        pl.DataFrame([reasons.alias("reason"), is_held_out.alias("held_out")]).select(split.alias("split")).to_series()
    )


def _distinct(rows: pl.LazyFrame, is_held_out: pl.Series, column: str) -> dict[str, int]:
    keys = rows.select(column).collect().to_series()
    return {
        TRAIN: keys.filter(~is_held_out).drop_nulls().n_unique(),
        VALIDATION: keys.filter(is_held_out).drop_nulls().n_unique(),
    }


def _write_lines(folder: Path, rows: pl.LazyFrame, splits: pl.Series) -> None:
    lines = rows.select(PLACE).collect().with_columns(split=splits).select(Placed._fields)
    with ExitStack() as stack:
        targets = {
            split: stack.enter_context((folder / f"{split}.jsonl").open("wb", buffering=1 << 20))
            for split in (TRAIN, VALIDATION, DROPPED)
        }
        copy_lines((Placed(*line) for line in lines.iter_rows()), targets)


def _write_table(path: Path, rows: pl.LazyFrame, decision: _Decision) -> None:
    columns = pl.DataFrame([decision.splits.alias("split"), decision.reasons.alias("drop_reason")])
    # In parts, each read for itself: all rows at once take three times the memory.
    parts = [
        pl.concat([rows.slice(start, _PART), columns[start : start + _PART].lazy()], how="horizontal")
        for start in range(0, len(columns), _PART)
    ]
    apart = pl.QueryOptFlags(comm_subplan_elim=False)
    pl.concat(parts).sink_parquet(path, row_group_size=_PART, optimizations=apart)


def _write_held_out_inputs(folder: Path, source: Source, held_out: set[str], settings: FilterSettings) -> int:
    """Writes one input row for each held-out task that a sidecar knows; returns how many.

    A task without a single readable rollout is held out by the same rule, since a later round may bring one.
    """
    clusters = dict.fromkeys(source.rows.select(pl.col("cluster_key").drop_nulls().unique()).collect()["cluster_key"])
    cluster_of = _known_clusters(source)
    written: set[str] = set()
    with (folder / HELD_OUT_INPUTS).open("wb") as target:
        for file in source.files:
            sidecar = load_sidecar(file, dotted_cluster(settings))
            for asked in sidecar.rows.values():
                key = asked.input_key
                if key in written:
                    continue
                cluster = cluster_of.get(key)
                if cluster is None:
                    if source.blind:
                        continue
                    cluster = source.clusters.get(key) or asked.cluster_key or key
                if cluster in held_out or (
                    cluster not in clusters and hash_value(cluster, settings.split_salt) < settings.validation
                ):
                    written.add(key)
                    target.write(json.dumps(sidecar.read(asked)).encode() + b"\n")
    if not written:
        (folder / HELD_OUT_INPUTS).unlink()
    return len(written)


def _known_clusters(source: Source) -> Mapping[str, str]:
    """Input key → cluster key, of the tasks that have a rollout."""
    pairs = source.rows.select("input_key", "cluster_key").drop_nulls().unique("input_key", keep="last")
    return dict(pairs.collect().iter_rows())


def _nothing_left(
    rows: int, dropped: Mapping[str, int], validation: int, threshold: float, why: str, rewards: Sequence[float]
) -> UserError:
    table = "\n".join(f"  {count:>7}  {reason}: {drop_sentence(reason)}" for reason, count in dropped.items())
    if validation:
        what = f"all {validation} rollouts that are good enough belong to held-out tasks: nothing is left to train on"
        remedy = "collect more, pass another --split-salt, or --validation 0"
    else:
        what = f"none of the {rows} lines is worth training on"
        most = next(iter(dropped))
        if most == "below_threshold":
            remedy = (
                f"the threshold is {threshold:g} ({why}), the highest reward {max(rewards):g}: "
                "collect more rollouts, or lower --reward-threshold"
            )
        elif most == "reward_missing":
            remedy = "the rows carry no reward: collect with an environment that verifies, or let Gym verify them again"
        elif most.startswith("context:"):
            remedy = "--keep-context keeps rollouts whose context is not complete"
        elif most == "truncated":
            remedy = "collect with a larger --max-output-tokens, or pass --keep-truncated"
        elif most.partition(":")[0] in ("reject", "skip"):
            remedy = "gymtrl inspect shows file, line and cause of each"
        else:
            remedy = "gymtrl filter --dry-run shows how many rows each rule leaves"
    return UserError(f"{what}\n{table}", remedy=remedy)
