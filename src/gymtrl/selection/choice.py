"""Which rollouts are kept: the rules applied one after the other, each to what the ones before it left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import polars as pl

from gymtrl.rollouts.groups import tied_tasks

from .measures import MEASURES, State
from .overlaps import Overlapping, find_overlapping
from .rules import COLUMN_RULES, CONTAMINATED, REWARD_RULES, Rule
from .settings import FilterSettings


@dataclass(frozen=True)
class Choice:
    """Rollouts after the rules that need no threshold; `at` applies the rest.

    Attributes:
        state (`State`): The rows, and why those are dropped that are.
        overlapping (`dict[str, Overlapping]`): Task key → where a benchmark holds it.
    """

    state: State
    overlapping: dict[str, Overlapping] = field(default_factory=dict)

    def at(self, threshold: float | pl.Series) -> pl.Series:
        """Why each row is dropped with this threshold, or one for each row; null where it is kept."""
        return apply(REWARD_RULES, replace(self.state, threshold=threshold)).reasons


def choose(rows: pl.LazyFrame, settings: FilterSettings) -> Choice:
    """Applies the rules that need no threshold.

    Args:
        rows (`pl.LazyFrame`): The rollout table.
        settings (`FilterSettings`): What is kept.

    Raises:
        `UserError`: If the condition of `where` cannot be evaluated, or a benchmark cannot be read.
    """
    state = apply(COLUMN_RULES, _start(rows, settings))
    if settings.benchmark is None:
        return Choice(state)
    overlapping = find_overlapping(state, settings.benchmark)
    return Choice(apply([CONTAMINATED], replace(state, overlapping=frozenset(overlapping))), overlapping)


def apply(rules: Iterable[Rule], state: State) -> State:
    """Drops rows by rules, in their order; a row that is dropped keeps its first reason."""
    for rule in rules:
        condition = rule.drops(state.settings)
        if condition is not None:
            state = replace(state, reasons=_after(rule, condition, state))
    return state


def _after(rule: Rule, condition: pl.Expr, state: State) -> pl.Series:
    used = set(condition.meta.root_names())
    columns = used - MEASURES.keys() | ({rule.detail} if rule.detail else set()) | {"line"}
    frame = state.rows.select(sorted(columns)).collect()
    frame = frame.with_columns(MEASURES[name](state).alias(name) for name in sorted(used & MEASURES.keys()))
    code = pl.format("{}:{}", pl.lit(rule.name), pl.col(rule.detail)) if rule.detail else pl.lit(rule.name)
    dropped = pl.when(pl.col("_reason").is_null() & condition.fill_null(False)).then(code).otherwise("_reason")
    return frame.with_columns(state.reasons.alias("_reason")).select(dropped.alias("reason")).to_series()


def _start(rows: pl.LazyFrame, settings: FilterSettings) -> State:
    row_ids = rows.select("row_id").collect().to_series()
    draws = [int.from_bytes(hashlib.sha256(f"{settings.seed}:{i}".encode()).digest()[:8]) for i in row_ids]
    return State(
        rows=rows,
        settings=settings,
        reasons=pl.Series("reason", [None], dtype=pl.String).new_from_index(0, len(draws)),
        tasks=_task_numbers(rows),
        draws=pl.Series("draw", draws, dtype=pl.UInt64),
    )


def _task_numbers(rows: pl.LazyFrame) -> pl.Series:
    """A number for each row's task; tasks that share an input row are one."""
    pairs = rows.filter(pl.col("input_key").is_not_null()).select("task_key", "input_key").unique()
    shared = pairs.filter(pl.col("task_key").n_unique().over("input_key") > 1).sort("task_key", "input_key").collect()
    tied = tied_tasks(shared.iter_rows())
    key = pl.col("task_key").replace(list(tied), list(tied.values())) if tied else pl.col("task_key")
    return rows.select(key).collect().to_series().cast(pl.Categorical).to_physical().alias("task")
