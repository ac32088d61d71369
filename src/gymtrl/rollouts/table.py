"""The rollout table: one row a line, with everything that later stages sort, group and count by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from .columns import COLUMNS
from .groups import group_key
from .keys import completion_key
from .messages import text_length
from .quality import fault
from .record import Line

SCHEMA: dict[str, pl.DataType] = {column.name: column.kind for column in COLUMNS}
COMPONENT = "reward_"
"""Prefix of the columns that follow those of `SCHEMA`: one for each component of the reward, sorted by name."""

_NO_ROLLOUT = tuple(() if isinstance(kind, pl.List) else None for kind in SCHEMA.values())[8:]


def rollout_table(lines: Iterable[Line]) -> pl.DataFrame:
    """The table of many lines.

    Rollouts of one index whose tasks differ are no group: their `group` is null and they are flagged `prompt_differs`.

    Args:
        lines (`Iterable[Line]`): As `read_lines` gives them.

    Returns:
        `pl.DataFrame`: With the columns and types of `SCHEMA`, then one for each reward component, in the order of the
            lines.
    """
    table = raw_table(lines)
    return without_false_groups(table.lazy(), false_groups(table.lazy())).collect()


def raw_table(lines: Iterable[Line]) -> pl.DataFrame:
    """The table of some of the lines of a file, before what can be told of all of them only."""
    rows: list[tuple[Any, ...]] = []
    components: dict[str, list[float | None]] = {}
    for line in lines:
        rows.append(_row(line))
        if line.rollout is not None and line.rollout.reward_components:
            for name, value in line.rollout.reward_components.items():
                column = components.setdefault(COMPONENT + name, [])
                column.extend([None] * (len(rows) - 1 - len(column)))
                column.append(value)
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA)
    series = [_series(name, column, kind) for (name, kind), column in zip(SCHEMA.items(), columns, strict=True)]
    for name in sorted(components):
        padded = components[name] + [None] * (len(rows) - len(components[name]))
        series.append(pl.Series(name, padded, pl.Float64()))
    return pl.DataFrame(series)


def false_groups(table: pl.LazyFrame) -> list[str]:
    """Groups whose rollouts were asked different things."""
    keys = table.select("group", task=pl.col("task_key").hash()).filter(pl.col("group").is_not_null())
    ends = keys.group_by("group").agg(first=pl.col("task").min(), last=pl.col("task").max())
    differing = ends.filter(pl.col("first") != pl.col("last")).select("group")
    return differing.collect(engine="streaming")["group"].to_list()


def without_false_groups(table: pl.LazyFrame, groups: list[str]) -> pl.LazyFrame:
    """The table in which those groups are none, and their rows are flagged."""
    if not groups:
        return table
    differs = pl.col("group").is_in(groups).fill_null(False)
    flagged = pl.concat_list("flags", pl.lit(["prompt_differs"])).list.sort()
    return table.with_columns(
        flags=pl.when(differs).then(flagged).otherwise("flags"), group=pl.when(~differs).then("group")
    )


def _row(line: Line) -> tuple[Any, ...]:
    origin, rollout = line.origin, line.rollout
    place = (origin.file, origin.line, origin.offset, origin.length, origin.row_id)
    judged = (line.verdict, line.reason, line.detail or None)
    if rollout is None:
        return place + judged + _NO_ROLLOUT
    calls = [call.name for message in rollout.completion for call in message.tool_calls] if rollout.n_tool_calls else []
    return (
        *place,
        *judged,
        rollout.task_key,
        rollout.input_key,
        rollout.cluster_key,
        completion_key(rollout.completion),
        group_key(rollout),
        rollout.task_index,
        rollout.rollout_index,
        rollout.agent,
        rollout.environment,
        rollout.model,
        rollout.reward,
        rollout.turns,
        rollout.n_tool_calls,
        tuple(sorted(set(calls))),
        text_length(rollout.prompt),
        text_length(rollout.completion),
        rollout.input_tokens,
        rollout.output_tokens,
        sum(len(turn.generation_token_ids) for turn in rollout.recorded) if rollout.recorded else None,
        rollout.truncated,
        rollout.masked,
        fault(rollout) or None,
        rollout.flags,
    )


def _series(name: str, values: Sequence[Any], kind: pl.DataType) -> pl.Series:
    if not isinstance(kind, pl.List):
        return pl.Series(name, values, kind)
    # Few lists are different, and making one is slow.
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return pl.Series(name, [list(value) for value in places], kind).gather([places[value] for value in values])
