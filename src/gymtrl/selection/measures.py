"""Columns that rules ask for beyond those of the table: what depends on the settings, on other rows, or on the text.

Each is a function of the state so far. What is costly is looked at for the rows that are kept so far, null elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from gymtrl.rollouts.record import Origin

from .lines import PLACE, read_rollout
from .settings import FilterSettings
from .where import where_holds


@dataclass(frozen=True)
class Read:
    """What rollouts that were read have shown, so that another threshold need not read them again.

    Attributes:
        repetition (`dict[int, float]`): By row number.
        near (`dict[int, tuple[list[int], list[bool]]]`): By task number the rows that were compared, best first, and
            which of them nearly repeat an earlier one.
    """

    repetition: dict[int, float] = field(default_factory=dict)
    near: dict[int, tuple[list[int], list[bool]]] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Rows on their way through the rules.

    Attributes:
        rows (`pl.LazyFrame`): The rollout table.
        settings (`FilterSettings`): What is kept.
        reasons (`pl.Series`): For each row the reason code, null while it is kept.
        tasks (`pl.Series`): For each row a number that stands for its task.
        draws (`pl.Series`): For each row a number drawn from its bytes and the seed.
        threshold (`float` or `pl.Series`): Lowest reward that is kept, of all rows or of each.
        overlapping (`frozenset[str]`): Keys of the tasks that a benchmark holds.
        read (`Read`): What rollouts that were read have shown.
    """

    rows: pl.LazyFrame
    settings: FilterSettings
    reasons: pl.Series
    tasks: pl.Series
    draws: pl.Series
    threshold: float | pl.Series = 0.0
    overlapping: frozenset[str] = frozenset()
    read: Read = field(default_factory=Read)

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
    return pl.DataFrame([_good(state), state.tasks]).select(pl.col("good").mean().over("task")).to_series()


def _holds(state: State) -> pl.Series:
    return where_holds(state.rows, state.settings.where or "")


def _overlaps(state: State) -> pl.Series:
    return state.rows.select(pl.col("task_key").is_in(sorted(state.overlapping))).collect().to_series()


def _threshold(state: State) -> pl.Series:
    if isinstance(state.threshold, pl.Series):
        return state.threshold
    return pl.Series([state.threshold], dtype=pl.Float64).new_from_index(0, len(state.reasons))


def _pass_rate(state: State) -> pl.Series:
    """Of each row's group; rows that are in none, because their index was asked different things, group by task."""
    groups = state.rows.select(pl.coalesce("group", "task_key").alias("group")).collect()
    return groups.with_columns(_good(state)).select(pl.col("good").mean().over("group")).to_series()


def _good(state: State) -> pl.Series:
    """For each row whether its reward reaches the threshold; null where it is no measurement."""
    rewards = state.rows.select(pl.when(is_measured(state.settings)).then("reward").alias("reward")).collect()
    return (rewards["reward"] >= _threshold(state)).alias("good")


def _repetition(state: State) -> pl.Series:
    from .near import completion_text
    from .repetition import repetition

    kept, known = state.kept(*PLACE), state.read.repetition
    for index, *place in kept.filter(~pl.col("index").is_in(list(known))).select("index", *PLACE).iter_rows():
        known[index] = repetition(completion_text(read_rollout(Origin(*place)).completion))
    values = pl.Series([known[index] for index in kept["index"]], dtype=pl.Float64)
    return state.spread(kept.with_columns(repetition=values), "repetition")


def _ordered(state: State, *columns: str) -> pl.DataFrame:
    """What is kept, best first: highest reward, then by a draw that depends on the bytes of the line and the seed."""
    kept = state.kept("reward", *columns)
    return kept.sort("reward", "draw", "index", descending=[True, False, False])


def _copy(state: State) -> pl.Series:
    earlier = pl.int_range(pl.len()).over("task", "completion_key") > 0
    return state.spread(_ordered(state, "completion_key").with_columns(copy=earlier), "copy")


def _near_copy(state: State) -> pl.Series:
    from .near import _FEW

    tasks = _ordered(state, *PLACE).group_by("task").agg(pl.col("index", *PLACE)).filter(pl.col("index").list.len() > 1)
    near: list[int] = []
    # In the order of the files, so that what is read lies together.
    for task, indexes, *places in tasks.sort(pl.col("index").list.min()).select("task", "index", *PLACE).iter_rows():
        compared, repeats = state.read.near.get(task, ([], []))
        # A higher threshold leaves the better ones, each compared with those before it alone; many are only sketched.
        if compared[: len(indexes)] != indexes or (len(compared) > _FEW) != (len(indexes) > _FEW):
            repeats = _repeats(Origin(*place) for place in zip(*places, strict=True))
            state.read.near[task] = (indexes, repeats)
        near += [index for index, repeat in zip(indexes, repeats, strict=False) if repeat]
    return state.spread(pl.DataFrame({"index": near}, {"index": pl.UInt32}).with_columns(near=True), "near")


def _repeats(origins: Iterable[Origin]) -> list[bool]:
    from .near import completion_text, near_duplicates

    found = near_duplicates([completion_text(read_rollout(origin).completion) for origin in origins])
    return [earlier is not None for earlier in found]


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
