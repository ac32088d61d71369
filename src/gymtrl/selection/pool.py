"""Good, bad and failed rollouts side by side: what preference, unpaired and group datasets are chosen from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import ValidationError

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import digest
from gymtrl.rollouts.good_for import find_thresholds
from gymtrl.rollouts.record import Origin
from gymtrl.rollouts.scan import read_facts
from gymtrl.workspace.artefact import MANIFEST, Manifest, read_manifest

from .choice import apply, choose
from .decision import DROPPED, TRAIN, VALIDATION
from .measures import MEASURES, State, is_measured
from .rules import RULES
from .settings import FilterSettings
from .source import open_source
from .split import held_out_clusters, table_clusters
from .threshold import Threshold

FAILED = ("reward_missing", "reward_not_finite", "masked")
"""Reasons of a rollout that the world spoiled, not the policy: its reward says nothing."""

# Dropped behind the threshold, these are no worse than what was kept. Those below it are the bad ones. Copies and what
# is over the cap were too much for a set of good examples; as a partner in a pair or as a member of a group they count.
# Not here: `pass_rate`, `above_max_reward` and `repetitive`, by which the user said what is not to be learned from.
_BAD = "below_threshold"
_SPARE = ("duplicate_completion", "near_duplicate", "over_cap")
# The user asked for others: they say nothing about the task that was asked for.
_ELSEWHERE = ("other_agent", "other_environment")

_COLUMNS = (
    *("file", "line", "length", "row_id", "offset", "task_key", "input_key", "cluster_key", "group"),
    *("completion_key", "completion_chars"),
)


@dataclass(frozen=True)
class Candidate:
    """A rollout that may be chosen.

    Attributes:
        origin (`Origin`): Where its bytes can be read now.
        file (`str`), line (`int`): Where the user's line stood.
        row_id (`str`): First 16 hex digits of the SHA-256 of the line.
        task_key, cluster_key (`str`): As in the rollout table.
        input_key (`str`, *optional*): Likewise.
        side (`str`): `train` or `validation`.
        reward (`float`, *optional*): `None` where it is no measurement.
        good (`bool`, *optional*): Whether the reward reaches the threshold; `None` without reward or threshold.
        group (`str`, *optional*): The rollouts of one file that answer the same task.
    """

    origin: Origin
    file: str
    line: int
    row_id: str
    task_key: str
    input_key: str | None
    cluster_key: str
    side: Literal["train", "validation"]
    reward: float | None
    good: bool | None
    group: str | None


@dataclass(frozen=True)
class Pool:
    """All lines of a source, and which of them may be chosen.

    Attributes:
        rows (`pl.DataFrame`): One row a line, keys and numbers only: columns of the rollout table, and `index` (row
            number), `task` (the first row of the task; tasks that share an input row are one), `side`, `reward` (null
            where it is no measurement), `good`, `kept` (a filter kept it), `near_copy` (it nearly repeats one that a
            filter kept), `whole` (neither truncated nor faulty), `cut` (nothing but that it is truncated
            speaks against it), `counts` (its reward tells of its task),
            `completion` (equal for equal completions), `at_file`, `at_line`, `at_offset` (where its bytes stand now),
            and `reason` (why it cannot be used; null where it can).
        threshold (`float`, *optional*): Lowest good reward; `None` where each environment or agent has its own.
        thresholds (`dict[str, float]`): These.
        threshold_why (`str`): Where it came from, or why there is none.
    """

    rows: pl.DataFrame
    threshold: float | None
    threshold_why: str
    thresholds: dict[str, float] = field(default_factory=dict)

    def usable(self, seed: int) -> pl.DataFrame:
        """The rows that can be used, with a `draw` from their bytes and the seed."""
        rows = self.rows.filter(pl.col("reason").is_null())
        return rows.with_columns(draws(rows["row_id"], str(seed)))

    def require_threshold(self) -> None:
        """Asks for a threshold.

        Raises:
            `UserError`: If there are rewards, and none of them is known to be good or bad.
        """
        known = self.rows.select(pl.col("good").is_not_null().any(), pl.col("reward").is_not_null().any()).row(0)
        if known == (False, True):
            raise UserError(self.threshold_why, remedy="pass --reward-threshold, the lowest reward that is good")

    def is_binary(self) -> bool:
        """Whether the rewards that can be used, and are known to be good or bad, take two values at most."""
        return self.rows.filter(pl.col("reason").is_null(), pl.col("good").is_not_null())["reward"].n_unique() <= 2

    def candidates(self, indexes: Iterable[int]) -> list[Candidate]:
        """The candidates of some row numbers, in that order."""
        rows = self.rows[list(indexes)]
        origins = rows.select("at_file", "at_line", "at_offset", "length", "row_id").iter_rows()
        rest = rows.select(list(Candidate.__dataclass_fields__)[1:]).iter_rows()
        return [Candidate(Origin(*origin), *row) for origin, row in zip(origins, rest, strict=True)]

    def unused(self, used: Iterable[int], why: pl.DataFrame) -> pl.DataFrame:
        """The account of a choice: every line that was not used, with its reason.

        Args:
            used (`Iterable[int]`): Row numbers of what was chosen.
            why (`pl.DataFrame`): `index` and `why` of what could be used and was not; of others it is not looked at.

        Returns:
            `pl.DataFrame`: `row_id`, `file`, `line`, `split` and `reason`, in the order of the table.
        """
        left = self.rows.filter(~pl.col("index").is_in(pl.Series(list(used), dtype=pl.UInt32).implode()))
        left = left.join(why.select("index", "why"), on="index", how="left", maintain_order="left")
        found = left.select("row_id", "file", "line", split="side", reason=pl.coalesce("reason", "why"))
        if found["reason"].null_count():
            raise AssertionError("lines were neither used nor given a reason")
        return found


def open_pool(
    source: Path,
    work: Path,
    *,
    reward_threshold: float | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Pool:
    """Opens what can be chosen from.

    Args:
        source (`Path`): A filter folder, whose settings say what is good, what is left out and what is held out; or a
            rollout file, a folder of them or a rollout table, of which all is trained on.
        work (`Path`): Folder for a new table; it must outlive the call only.
        reward_threshold (`float`, *optional*): Lowest good reward, not with a filter folder. Unset: by the rules of
            `good_for.find_thresholds`.
        on_bytes (`Callable[[int], object]`, *optional*): Called with the number of bytes read since the last call.

    Returns:
        `Pool`: Every line; without threshold where no rule gives one.

    Raises:
        `UserError`: If the source is missing, holds no rollout, or has changed since its table was made; if a threshold
            is named for a filter folder.
    """
    if reward_threshold is not None and not math.isfinite(reward_threshold):
        raise UserError(f"the reward threshold {reward_threshold} is not finite", remedy="name a number")
    if (source / MANIFEST).is_file() and (manifest := read_manifest(source)).verb == "filter":
        if reward_threshold is not None:
            raise UserError(
                f"{source} was filtered with a threshold already",
                remedy="leave out --reward-threshold, or filter again with it",
            )
        return _of_filter(source, manifest)
    return _of_rollouts(source, work, reward_threshold, on_bytes)


def draws(row_ids: pl.Series, seed: str) -> pl.Series:
    """A number for each row, drawn from its bytes and a seed; named `draw`."""
    drawn = (int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8]) for row_id in row_ids)
    return pl.Series("draw", drawn, dtype=pl.UInt64)


def _of_rollouts(
    source: Path, work: Path, reward_threshold: float | None, on_bytes: Callable[[int], object] | None
) -> Pool:
    settings = FilterSettings()
    if source.suffix == ".parquet" and source.is_file() and "split" in pl.read_parquet_schema(source):
        raise UserError(
            f"{source} is the table of a filter, which says what is held out",
            remedy=f"name the folder: {source.parent}",
        )
    rows = open_source([source], work, settings, on_bytes).rows
    state = choose(rows, settings).state
    thresholds = find_thresholds(rows.filter(pl.col("verdict").is_in(["ok", "context"])), reward_threshold)
    good = rows.select(good=thresholds.is_good()).collect().to_series()
    side = pl.Series("side", [TRAIN]).new_from_index(0, len(good))
    place = rows.select(at_file="file", at_line="line", at_offset="offset").collect()
    return Pool(
        _rows(state, state.reasons == "truncated", good, side, place), thresholds.whole, thresholds.why, thresholds.each
    )


def _of_filter(folder: Path, manifest: Manifest) -> Pool:
    try:
        settings = FilterSettings.model_validate(manifest.settings)
        threshold = manifest.extra["reward_threshold"]
        thresholds = manifest.extra.get("reward_thresholds", {})
        why = manifest.extra["reward_threshold_why"]
    except (ValidationError, KeyError):
        message = f"{folder} was written by another version of gymtrl filter"
        raise UserError(message, remedy="filter again") from None
    table = folder / "table.parquet"
    read_facts(table)  # refuses what is no table
    rows = pl.scan_parquet(table, glob=False)
    splits, reasons = rows.select("split", "drop_reason").collect()
    state = replace(choose(rows, FilterSettings()).state, settings=settings, reasons=_unusable(reasons))
    usable = state.reasons.is_null()
    lowest = Threshold(threshold, why, [], thresholds).of_rows(state)
    state = _outside_band(replace(state, threshold=lowest))
    only_cut = _only_cut(state, usable)
    good = rows.select("reward").collect().select(good=pl.col("reward") >= lowest).to_series()
    held_out = held_out_clusters(table_clusters(rows), settings.validation, settings.split_salt)
    inside = pl.col("cluster_key").is_in(list(held_out)).fill_null(False)
    drawn = pl.when(inside).then(pl.lit(VALIDATION)).otherwise(pl.lit(TRAIN))
    side = rows.select(side=drawn).collect().to_series()
    return Pool(_rows(state, only_cut, good, side, _places(folder, rows, splits)), threshold, why, thresholds)


def _unusable(reasons: pl.Series) -> pl.Series:
    usable = pl.col("reason").is_in([_BAD, *_SPARE])
    return pl.DataFrame([reasons.alias("reason")]).select(pl.when(~usable).then("reason")).to_series()


def _outside_band(state: State) -> State:
    """Without the bad rollouts of tasks that the user left out by their pass rate: the good ones are gone already."""
    if state.settings.pass_rate is None:
        return state
    rates = pl.DataFrame([state.reasons.alias("reason"), MEASURES["pass_rate"](state).alias("rate")])
    outside = pl.col("reason").is_null() & ~pl.col("rate").is_between(*state.settings.pass_rate)
    reason = pl.when(outside).then(pl.lit("pass_rate")).otherwise("reason").alias("reason")
    return replace(state, reasons=rates.select(reason).to_series())


def _only_cut(state: State, usable: pl.Series) -> pl.Series:
    """Which of the rows that a filter dropped as truncated it would not have dropped for anything else.

    Args:
        state (`State`): With the settings and the threshold of the filter.
        usable (`pl.Series`): Which rows its rules have left, those for the pass rate aside.
    """
    cut = (state.reasons == "truncated").fill_null(False)
    if not cut.any():
        return cut
    # What is dropped already is not read again.
    others = pl.DataFrame([cut.alias("cut")]).select(reason=pl.when(~pl.col("cut")).then(pl.lit("-")))
    settings = state.settings.model_copy(update={"keep_truncated": True, "dedup": "none", "balance": "none"})
    again = replace(state, settings=settings, reasons=others.to_series())
    if settings.benchmark is not None:
        # What the benchmark holds it holds with all its rollouts. Of a task without any left it cannot be told.
        tasks = state.rows.select("task_key").collect().to_series()
        again = replace(again, overlapping=frozenset(tasks.drop_nulls()) - frozenset(tasks.filter(usable)))
    again = apply(RULES, again)
    return _outside_band(replace(again, reasons=_unusable(again.reasons))).reasons.is_null()


def _places(folder: Path, rows: pl.LazyFrame, splits: pl.Series) -> pl.DataFrame:
    """Where the lines stand in the folder's own files, which outlive the ones that they were copied from.

    Each split's lines stand in the order of the table, one line break behind each.
    """
    lines = rows.select("length").collect().with_columns(split=splits).with_columns(size=pl.col("length") + 1)
    for split in (TRAIN, VALIDATION, DROPPED):
        path = folder / f"{split}.jsonl"
        expected = lines.filter(pl.col("split") == split)["size"].sum()
        if not path.is_file() or path.stat().st_size != expected:
            raise UserError(f"{path} is not the file that the filter wrote", remedy="filter again")
    return lines.select(
        at_file=pl.lit(str(folder) + "/") + pl.col("split") + pl.lit(".jsonl"),
        at_line=pl.int_range(1, pl.len() + 1).over("split"),
        at_offset=(pl.col("size").cum_sum() - pl.col("size")).over("split"),
    )


def _rows(state: State, only_cut: pl.Series, good: pl.Series, side: pl.Series, place: pl.DataFrame) -> pl.DataFrame:
    truncated, faultless = pl.col("truncated").fill_null(False), pl.col("fault").is_null()
    measured = is_measured(state.settings).fill_null(False)
    names = set(state.rows.collect_schema().names())
    dropped = pl.col("drop_reason") if "drop_reason" in names else pl.lit("")
    kept, near_copy = dropped.is_null(), dropped.eq_missing("near_duplicate")
    rows = state.rows.select(
        *_COLUMNS,
        "reward",
        whole=~truncated & faultless,
        cut=(truncated & faultless & measured).fill_null(False),
        measured=measured,
        kept=kept,
        near_copy=near_copy,
    ).collect()
    rows = pl.concat([rows.drop("offset"), place], how="horizontal").with_columns(
        state.tasks.alias("task"), good.alias("good"), side.alias("side"), state.reasons.alias("reason")
    )
    rows = rows.with_columns(cut=pl.col("cut") & (state.reasons.is_null() | only_cut.fill_null(False)))
    # A digest does to tell completions apart, and takes an eighth of the memory.
    rows = rows.with_columns(completion=pl.col("completion_key").hash()).drop("completion_key")
    usable = pl.col("reason").is_null()
    return rows.with_row_index("index").with_columns(
        task=pl.col("index").min().over("task"),
        reward=pl.when("measured").then("reward"),
        good=pl.when("measured").then("good"),
        counts=pl.col("measured") & ~pl.col("reason").is_in(_ELSEWHERE).fill_null(False),
        # `--keep-truncated` keeps what no trained side of a dataset can hold.
        reason=pl.when(usable & ~pl.col("whole")).then(pl.lit("truncated")).otherwise("reason"),
        group=_groups(rows),
    )


def _groups(rows: pl.DataFrame) -> pl.Series:
    """The groups; rows whose index was asked different things are in none, and group by their task."""
    alone = rows.filter(pl.col("group").is_null() & pl.col("task_key").is_not_null()).select("file", "task_key")
    alone = alone.unique()
    own = pl.Series("own", [digest(list(row))[:16] for row in alone.iter_rows()], dtype=pl.String)
    found = alone.with_columns(own)
    named = rows.select("group", "file", "task_key").join(
        found, on=["file", "task_key"], how="left", maintain_order="left"
    )
    return named.select(pl.coalesce("group", "own").alias("group")).to_series()
