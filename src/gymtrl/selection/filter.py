"""Rollouts → what is worth training on, what is held out, and what is dropped, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from gymtrl.rollouts.sidecars import load_sidecar
from gymtrl.workspace.artefact import Counts, artefact, sha256_of

from .choice import choose
from .clusters import count_unnamed
from .decision import DROPPED, TRAIN, VALIDATION, Decision, counted, divide, drop_reasons
from .lines import PLACE, Placed, copy_lines
from .overlaps import Overlapping, contaminated_rows
from .settings import FilterSettings
from .source import Source, dotted_cluster, open_source
from .source import files_read as files_read
from .split import hash_value
from .threshold import find_threshold

HELD_OUT_INPUTS = "heldout_inputs.jsonl"
CONTAMINATED_ROWS = "contaminated.jsonl"
_PART = 25_000


@dataclass(frozen=True)
class FilterResult:
    """What `filter_rollouts` did.

    Attributes:
        path (`Path`): The folder.
        train, validation (`int`): Rollouts in `train.jsonl` and `validation.jsonl`.
        dropped (`dict[str, int]`): Lines in `dropped.jsonl` by reason code.
        threshold (`float`, *optional*): Lowest reward that was kept; `None` where each environment or agent
            has its own.
        threshold_why (`str`): Where it came from.
        thresholds (`dict[str, float]`): Those of each environment or agent; empty where there is one for all.
        kept_tasks (`dict[str, int]`): Distinct tasks in `train.jsonl` and `validation.jsonl`.
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
    threshold: float | None
    threshold_why: str
    thresholds: dict[str, float]
    kept_tasks: dict[str, int]
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
        choice = choose(source.rows, settings)
        threshold = find_threshold(choice.state)
        decision = divide(choice, drop_reasons(choice, threshold), threshold)
        with artefact(out, verb="filter", settings=settings, inputs=files_read(inputs, settings)) as draft:
            heldout_inputs = _write(draft.path, source, decision, choice.overlapping, settings)
            rows = decision.rows()
            result = FilterResult(
                path=out,
                train=rows[TRAIN],
                validation=rows[VALIDATION],
                dropped=counted(decision.reasons),
                threshold=threshold.value,
                threshold_why=threshold.why,
                thresholds=dict(threshold.each),
                kept_tasks=decision.kept_tasks(),
                tasks=_distinct(source.rows, decision.is_held_out, "task_key"),
                clusters=_distinct(source.rows, decision.is_held_out, "cluster_key"),
                heldout_inputs=heldout_inputs,
                contaminated_tasks=len(choice.overlapping),
                tasks_without_cluster=count_unnamed(source.rows, source.clusters) if source.clusters else 0,
            )
            kept = result.train + result.validation
            draft.counts = Counts(read=len(decision.reasons), written=kept, dropped=result.dropped)
            draft.extra.update(_facts(result, settings, source))
            draft.extra["files"] = {
                name: sha256_of(draft.path / name) for name in (f"{TRAIN}.jsonl", f"{VALIDATION}.jsonl")
            }
    return result


def _write(
    folder: Path,
    source: Source,
    decision: Decision,
    overlapping: Mapping[str, Overlapping],
    settings: FilterSettings,
) -> int:
    """Writes everything but the manifest; returns the number of held-out inputs."""
    _write_lines(folder, source.rows, decision.splits)
    _write_table(folder / "table.parquet", source.rows, decision)
    if settings.benchmark is not None:
        with (folder / CONTAMINATED_ROWS).open("w", encoding="utf-8") as target:
            for row in contaminated_rows(source.rows, decision.reasons, overlapping):
                target.write(json.dumps(row) + "\n")
    return _write_held_out_inputs(folder, source, decision.held_out, settings)


def _facts(result: FilterResult, settings: FilterSettings, source: Source) -> dict[str, object]:
    facts: dict[str, object] = {
        "reward_threshold": result.threshold,
        "reward_threshold_why": result.threshold_why,
        "rollouts": {TRAIN: result.train, VALIDATION: result.validation},
        "kept_tasks": result.kept_tasks,
        "tasks": result.tasks,
        "clusters": result.clusters,
        "heldout_inputs": result.heldout_inputs,
    }
    if result.thresholds:
        facts["reward_thresholds"] = result.thresholds
    if settings.benchmark is not None:
        facts["contaminated_tasks"] = result.contaminated_tasks
    if source.clusters:
        facts["tasks_without_cluster"] = result.tasks_without_cluster
    return facts


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


def _write_table(path: Path, rows: pl.LazyFrame, decision: Decision) -> None:
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
