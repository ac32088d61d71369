"""How much could be trained on, by the default settings of the filter."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import polars as pl

from .groups import tied_tasks
from .quality import default_threshold
from .suspicions import MEASURED

SOURCE = pl.coalesce("environment", "agent", pl.lit(""))
"""What gave the reward: the environment, or where the row does not tell it the agent."""

_NAMED = 5
_OK = pl.col("verdict") == "ok"
_FIT = MEASURED & ~pl.col("truncated") & pl.col("fault").is_null()


class GoodFor(msgspec.Struct, frozen=True):
    """What could be trained on, counting `ok` rollouts only.

    Attributes:
        threshold (`float`, *optional*): Lowest good reward; `None` where no one rule fits all rewards.
        thresholds (`dict[str, float]`): There, that of each environment or agent whose own rewards have a rule; only
            these are counted.
        threshold_why (`str`): The rule that gave it, or why there is none.
        max_per_task (`int`): How many rollouts of a task count at most as rows for SFT.
        sft_rows (`int`, *optional*): Good, whole, distinct completions; `None` where it is not known what is good.
        dpo_pairs (`int`, *optional*): Groups with a good rollout and a bad one, both whole; `None` likewise.
        grpo_groups (`int`): Groups whose rewards differ.
    """

    threshold: float | None
    thresholds: dict[str, float]
    threshold_why: str
    max_per_task: int
    sft_rows: int | None
    dpo_pairs: int | None
    grpo_groups: int

    def threshold_of(self, environment: str | None, agent: str | None) -> float | None:
        """The lowest good reward of a rollout."""
        source = environment if environment is not None else agent
        return self.threshold if self.threshold is not None else self.thresholds.get(source or "")


class Thresholds(NamedTuple):
    """The lowest good reward of all rollouts, or of those of each source."""

    whole: float | None
    each: dict[str, float]
    why: str

    def is_good(self) -> pl.Expr:
        """Whether a reward reaches its threshold; null where there is none."""
        lowest = pl.lit(self.whole, pl.Float64)
        if self.each:
            lowest = SOURCE.replace_strict(self.each, default=None, return_dtype=pl.Float64)
        return pl.col("reward") >= lowest


def find_thresholds(rollouts: pl.LazyFrame, given: float | None) -> Thresholds:
    """Which rewards are good: as set, else by a rule for all of them, else by one for each environment or agent.

    Args:
        rollouts (`pl.LazyFrame`): Rows of the rollout table that are `ok` or `context`.
        given (`float`, *optional*): What the user set.

    Returns:
        `Thresholds`: Without a single one where no rule applies.
    """
    if given is not None:
        return Thresholds(given, {}, "as set")
    usable, reward = rollouts.filter(_OK & MEASURED), pl.col("reward")
    # Three values say what all of them do, and there may be as many as rollouts.
    values = usable.select(reward.unique().sort()).collect().to_series()
    whole, why = default_threshold([*values.head(2), *values.tail(1)])
    if whole is not None:
        return Thresholds(whole, {}, why)
    each, without = {}, []
    few = usable.group_by(source=SOURCE).agg(two=reward.unique().bottom_k(2), high=reward.max()).sort("source")
    for source, two, high in few.collect().iter_rows():
        threshold, _ = default_threshold([*two, high])
        if threshold is None:
            reach = f"from {min(two):g} to {high:g}" if min(two) < high else f"always {high:g}"
            without.append(f"{source or 'unnamed'} ({reach})")
        else:
            each[source] = threshold
    if not each:
        return Thresholds(None, {}, why)
    known = _some([f"{source or 'unnamed'} ({threshold:g})" for source, threshold in each.items()])
    lacking = f"; no rule for: {_some(without)}" if without else ""
    return Thresholds(None, each, f"environments or agents by themselves: {known}{lacking}")


def find_good(rollouts: pl.LazyFrame, thresholds: Thresholds, max_per_task: int) -> GoodFor:
    """Counts what could be trained on.

    Args:
        rollouts (`pl.LazyFrame`): Rows of the rollout table that are `ok` or `context`.
        thresholds (`Thresholds`): What is good.
        max_per_task (`int`): How many rollouts of a task count at most as rows for SFT.

    Returns:
        `GoodFor`: Plain data.
    """
    usable = rollouts.filter(_OK & MEASURED)
    good = thresholds.is_good()
    pair = (_FIT & good).any() & (_FIT & ~good).any()
    varied = pl.col("reward").n_unique() > 1
    groups = usable.filter(pl.col("group").is_not_null()).group_by("group").agg(pair=pair, varied=varied)
    pairs, differing = groups.select(pl.col("pair", "varied").sum()).collect().row(0)
    unknown = thresholds.whole is None and not thresholds.each and not usable.head(1).collect().is_empty()
    return GoodFor(
        threshold=thresholds.whole,
        thresholds=thresholds.each,
        threshold_why=thresholds.why,
        max_per_task=max_per_task,
        sft_rows=None if unknown else _sft_rows(rollouts, usable.filter(_FIT & good), max_per_task),
        dpo_pairs=None if unknown else pairs,
        grpo_groups=differing,
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _sft_rows(rollouts: pl.LazyFrame, good: pl.LazyFrame, max_per_task: int) -> int:
    # Digests of keys do here: their text is what would take the memory.
    pairs = rollouts.select(task=pl.col("task_key").hash(), row=pl.col("input_key").hash()).drop_nulls().unique()
    shared = pairs.filter(pl.len().over("row") > 1).collect()["row"].unique()
    tied = rollouts.filter(pl.col("input_key").hash().is_in(shared.implode())).select("task_key", "input_key").unique()
    same = tied_tasks(tied.collect().iter_rows()) if len(shared) else {}
    task, completion = pl.col("task_key").replace(same).hash(), pl.col("completion_key").hash()
    distinct = good.select(task, completion).unique().group_by("task_key").len()
    return int(distinct.select(pl.col("len").clip(0, max_per_task).sum()).collect().item())
