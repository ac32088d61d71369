"""Columns that rules ask for beyond those of the table: what depends on the settings, on other rows, or on the text.

Each is a function of the state so far. What is costly is looked at for the rows that are kept so far, null elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import polars as pl

from gymtrl.rollouts.record import Origin

from .lines import PLACE, read_rollout
from .settings import FilterSettings
from .where import where_holds


@dataclass(frozen=True)
class State:
    """Rows on their way through the rules.

    Attributes:
        rows (`pl.LazyFrame`): The rollout table.
        settings (`FilterSettings`): What is kept.
        reasons (`pl.Series`): For each row the reason code, null while it is kept.
        tasks (`pl.Series`): For each row a number that stands for its task.
        draws (`pl.Series`): For each row a number drawn from its bytes and the seed.
        threshold (`float`): Lowest reward that is kept.
        overlapping (`frozenset[str]`): Keys of the tasks that a benchmark holds.
    """

    rows: pl.LazyFrame
    settings: FilterSettings
    reasons: pl.Series
    tasks: pl.Series
    draws: pl.Series
    threshold: float = 0.0
    overlapping: frozenset[str] = frozenset()

    def kept(self, *columns: str) -> pl.DataFrame:
        """The given columns of the rows that are still kept, with `index` (row number), `task` and `draw`."""
        frame = self.rows.select(sorted({"line", *columns})).collect().with_row_index("index")
        return frame.with_columns(self.tasks, self.draws).filter(self.reasons.is_null())

    def spread(self, found: pl.DataFrame, column: str) -> pl.Series:
        """A column of some rows, known by their `index`, as one of all rows, null elsewhere."""
        every = pl.DataFrame({"index": pl.int_range(len(self.reasons), dtype=pl.UInt32, eager=True)})
        return every.join(found.select("index", column), on="index", how="left", maintain_order="left")[column]


def is_measured(settings: FilterSettings) -> pl.Expr:
    """Whether the reward is a valid, finite measurement of a rollout whose context is whole or need not be."""
    verdicts = ["ok", "context"] if settings.keep_context else ["ok"]
    return pl.col("verdict").is_in(verdicts) & pl.col("reward").is_finite().fill_null(False) & ~pl.col("masked")


def task_pass_rate(state: State) -> pl.Series:
    """Of each row's task, over all its groups, the share of valid rollouts that reach the threshold."""
    frame = state.rows.select(good=_is_good(state)).collect().with_columns(state.tasks)
    return frame.select(pl.col("good").mean().over("task")).to_series()


def _holds(state: State) -> pl.Series:
    return where_holds(state.rows, state.settings.where or "")


def _overlaps(state: State) -> pl.Series:
    return state.rows.select(pl.col("task_key").is_in(sorted(state.overlapping))).collect().to_series()


def _threshold(state: State) -> pl.Series:
    return pl.Series([state.threshold], dtype=pl.Float64).new_from_index(0, len(state.reasons))


def _pass_rate(state: State) -> pl.Series:
    """Of each row's group; rows that are in none, because their index was asked different things, group by task."""
    group = pl.coalesce("group", "task_key")
    return state.rows.select(_is_good(state).mean().over(group)).collect().to_series()


def _is_good(state: State) -> pl.Expr:
    """Whether the reward reaches the threshold; null where it is no measurement."""
    return pl.when(is_measured(state.settings)).then(pl.col("reward") >= state.threshold)


def _repetition(state: State) -> pl.Series:
    from .near import completion_text
    from .repetition import repetition

    kept = state.kept(*PLACE)
    places = kept.select(PLACE).iter_rows()
    values = [repetition(completion_text(read_rollout(Origin(*place)).completion)) for place in places]
    return state.spread(kept.with_columns(repetition=pl.Series(values, dtype=pl.Float64)), "repetition")


def _ordered(state: State, *columns: str) -> pl.DataFrame:
    """What is kept, best first: highest reward, then by a draw that depends on the bytes of the line and the seed."""
    kept = state.kept("reward", *columns)
    return kept.sort("reward", "draw", "index", descending=[True, False, False])


def _copy(state: State) -> pl.Series:
    earlier = pl.int_range(pl.len()).over("task", "completion_key") > 0
    return state.spread(_ordered(state, "completion_key").with_columns(copy=earlier), "copy")


def _near_copy(state: State) -> pl.Series:
    from .near import completion_text, near_duplicates

    tasks = _ordered(state, *PLACE).group_by("task").agg(pl.col("index", *PLACE)).filter(pl.col("index").list.len() > 1)
    near: list[int] = []
    # In the order of the files, so that what is read lies together.
    for indexes, *places in tasks.sort(pl.col("index").list.min()).select("index", *PLACE).iter_rows():
        origins = (Origin(*place) for place in zip(*places, strict=True))
        found = near_duplicates([completion_text(read_rollout(origin).completion) for origin in origins])
        near += [index for index, earlier in zip(indexes, found, strict=True) if earlier is not None]
    return state.spread(pl.DataFrame({"index": near}, {"index": pl.UInt32}).with_columns(near=True), "near")


def _place(state: State) -> pl.Series:
    return state.spread(_ordered(state).with_columns(place=pl.int_range(pl.len()).over("task")), "place")


def _allowance(state: State) -> pl.Series:
    """How many rollouts of each row's task are kept at most."""
    cap = state.settings.cap_per_task
    if state.settings.balance != "prop2diff":
        return pl.Series([cap], dtype=pl.Int64).new_from_index(0, len(state.reasons))
    kept = state.kept().with_columns((1 - task_pass_rate(state)).filter(state.reasons.is_null()).alias("difficulty"))
    hardest = kept["difficulty"].max()
    # Where every task is always solved, all are equally hard.
    share = pl.col("difficulty") / hardest if hardest else pl.lit(1.0)
    allowance = (cap * share + 0.5).floor().clip(lower_bound=1).cast(pl.Int64)
    return state.spread(kept.with_columns(allowance=allowance), "allowance")


MEASURES: Mapping[str, Callable[[State], pl.Series]] = {
    "holds": _holds,
    "overlaps": _overlaps,
    "threshold": _threshold,
    "pass_rate": _pass_rate,
    "repetition": _repetition,
    "copy": _copy,
    "near_copy": _near_copy,
    "place": _place,
    "allowance": _allowance,
}
