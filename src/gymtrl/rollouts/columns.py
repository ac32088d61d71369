"""The columns of the rollout table: what each is called, of what type it is, and what it holds."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl


class Column(NamedTuple):
    """A column of the rollout table.

    Attributes:
        name (`str`): What it is called.
        kind (`pl.DataType`): Its type.
        words (`str`): What it holds, in one sentence.
    """

    name: str
    kind: pl.DataType
    words: str


_TEXT, _COUNT, _NUMBER, _YES_NO, _TEXTS = pl.String(), pl.Int64(), pl.Float64(), pl.Boolean(), pl.List(pl.String())

COLUMNS = (
    Column("file", _TEXT, "Path of the file, as it was given."),
    Column("line", _COUNT, "Line number, from 1."),
    Column("offset", _COUNT, "First byte of the line in the file."),
    Column("length", _COUNT, "Bytes of the line, without its line break."),
    Column("row_id", _TEXT, "First 16 hex digits of the SHA-256 of these bytes."),
    Column("verdict", _TEXT, "`ok`, `context`, `reject` or `skip`."),
    Column("reason", _TEXT, "Reason code of the verdict; empty for `ok`."),
    Column("detail", _TEXT, "What was found, in words."),
    Column("task_key", _TEXT, "The task, over environment or agent, prompt and tools; the same in every run."),
    Column("input_key", _TEXT, "The task's input row, where the run's materialized inputs give it."),
    Column(
        "cluster_key",
        _TEXT,
        "What a split keeps together: what `--cluster` names, else input row, else task.",
    ),
    Column(
        "completion_key",
        _TEXT,
        "All that followed the prompt; equal for exact duplicates.",
    ),
    Column("group", _TEXT, "The rollouts of one file that answer the same task."),
    Column("task_index", _COUNT, "Number of the task in its run, from 0."),
    Column("repeat", _COUNT, "Number of the rollout among those of its task in the run."),
    Column("agent", _TEXT, "Name of the agent."),
    Column("environment", _TEXT, "Name of the environment server, where the row tells it."),
    Column("model", _TEXT, "Name of the model that answered."),
    Column("reward", _NUMBER, "The reward; null where there is none."),
    Column("turns", _COUNT, "Assistant messages of the completion."),
    Column("tool_calls", _COUNT, "Tool calls of the completion."),
    Column("tools", _TEXTS, "Names of the tools that were called."),
    Column("prompt_chars", _COUNT, "Characters of the prompt."),
    Column("completion_chars", _COUNT, "Characters of the completion, tool results included."),
    Column("input_tokens", _COUNT, "Prompt tokens, as the model server counted them."),
    Column("output_tokens", _COUNT, "Generated tokens, likewise."),
    Column("recorded_tokens", _COUNT, "Generated tokens whose ids are recorded; null where not all are."),
    Column("truncated", _YES_NO, "Whether the response is incomplete."),
    Column("masked", _YES_NO, "Whether the environment says that the reward is no valid measurement."),
    Column("fault", _TEXT, "What is wrong with the completion as such; null for nothing."),
    Column("flags", _TEXTS, "Remarks that change no verdict."),
)
"""In the order of the table. Null where a line is no rollout or does not say."""
