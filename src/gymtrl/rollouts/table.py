"""The rollout table: one row a line, with everything that later stages sort, group and count by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from .groups import group_key
from .keys import completion_key
from .quality import fault
from .record import Line, Message

SCHEMA: dict[str, pl.DataType] = {
    "file": pl.String(),
    "line": pl.Int64(),
    "offset": pl.Int64(),
    "length": pl.Int64(),
    "row_id": pl.String(),
    "verdict": pl.String(),
    "reason": pl.String(),
    "detail": pl.String(),
    "task_key": pl.String(),
    "input_key": pl.String(),
    "cluster_key": pl.String(),
    "completion_key": pl.String(),
    "group": pl.String(),
    "task_index": pl.Int64(),
    "repeat": pl.Int64(),
    "agent": pl.String(),
    "environment": pl.String(),
    "model": pl.String(),
    "reward": pl.Float64(),
    "turns": pl.Int64(),
    "tool_calls": pl.Int64(),
    "tools": pl.List(pl.String()),
    "prompt_chars": pl.Int64(),
    "completion_chars": pl.Int64(),
    "input_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "recorded_tokens": pl.Int64(),
    "truncated": pl.Boolean(),
    "masked": pl.Boolean(),
    "fault": pl.String(),
    "flags": pl.List(pl.String()),
}
COMPONENT = "reward_"
"""Prefix of the columns that follow those of `SCHEMA`: one for each component of the reward, sorted by name."""

_BLANK = dict.fromkeys(SCHEMA)


def table_row(line: Line) -> dict[str, Any]:
    """The row of one line; what only a rollout has is null for the others."""
    row: dict[str, Any] = _BLANK | {
        "file": line.origin.file,
        "line": line.origin.line,
        "offset": line.origin.offset,
        "length": line.origin.length,
        "row_id": line.origin.row_id,
        "verdict": line.verdict,
        "reason": line.reason,
        "detail": line.detail or None,
    }
    rollout = line.rollout
    if rollout is None:
        return row | {"flags": [], "tools": []}
    called = {call.name for message in rollout.completion for call in message.tool_calls}
    components = {COMPONENT + name: value for name, value in rollout.reward_components.items()}
    return (
        row
        | components
        | {
            "task_key": rollout.task_key,
            "input_key": rollout.input_key,
            "cluster_key": rollout.cluster_key,
            "completion_key": completion_key(rollout.completion),
            "group": group_key(rollout),
            "task_index": rollout.task_index,
            "repeat": rollout.rollout_index,
            "agent": rollout.agent,
            "environment": rollout.environment,
            "model": rollout.model,
            "reward": rollout.reward,
            "turns": rollout.turns,
            "tool_calls": rollout.n_tool_calls,
            "tools": sorted(called),
            "prompt_chars": text_length(rollout.prompt),
            "completion_chars": text_length(rollout.completion),
            "input_tokens": rollout.input_tokens,
            "output_tokens": rollout.output_tokens,
            "recorded_tokens": sum(len(turn.generation_token_ids) for turn in rollout.recorded) or None,
            "truncated": rollout.truncated,
            "masked": rollout.masked,
            "fault": fault(rollout) or None,
            "flags": list(rollout.flags),
        }
    )


def rollout_table(lines: Iterable[Line]) -> pl.DataFrame:
    """The table of many lines.

    Rollouts of one index whose tasks differ are no group: their `group` is null and they are flagged `prompt_differs`.

    Args:
        lines (`Iterable[Line]`): As `read_lines` gives them.

    Returns:
        `pl.DataFrame`: With the columns and types of `SCHEMA`, then one for each reward component, in the order of the
            lines.
    """
    return table_of([table_row(line) for line in lines])


def table_of(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """The table of rows made by `table_row`."""
    components = sorted({name for row in rows if len(row) > len(SCHEMA) for name in row.keys() - SCHEMA.keys()})
    schema = SCHEMA | dict.fromkeys(components, pl.Float64())
    columns = {name: [row.get(name) for row in rows] for name in schema}
    table = pl.DataFrame(columns, schema=schema, strict=True)
    differs = pl.col("group").is_not_null() & (pl.col("task_key").n_unique().over("group") > 1)
    return table.with_columns(
        flags=pl.when(differs).then(pl.concat_list("flags", pl.lit("prompt_differs")).list.sort()).otherwise("flags"),
        group=pl.when(~differs).then("group"),
    )


def text_length(messages: Iterable[Message]) -> int:
    """Characters of text, reasoning and call arguments."""
    return sum(
        len(message.content)
        + len(message.reasoning_content or "")
        + sum(len(call.arguments_json) for call in message.tool_calls)
        for message in messages
    )
