"""Tasks that a benchmark holds as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from gymtrl.rollouts.record import Origin

from .lines import PLACE, read_rollout
from .measures import State


class Overlapping(NamedTuple):
    """Where a benchmark holds a task.

    Attributes:
        by (`str`): How it was found.
        benchmark (`str`): `file:line`.
        share (`float`): How much of the prompt they have in common.
    """

    by: str
    benchmark: str
    share: float


def find_overlapping(state: State, benchmarks: Sequence[Path]) -> dict[str, Overlapping]:
    """Looks for the tasks of the rows that are still kept, reading one prompt a task.

    Returns:
        `dict[str, Overlapping]`: By task key.

    Raises:
        `UserError`: If a benchmark cannot be read, or a rollout is no longer where the table says.
    """
    from .contamination import Prompt, find_overlaps
    from .held_out import held_out_texts, prompt_text

    held_out = [text for path in benchmarks for text in held_out_texts(path)]
    kept = state.kept("task_key", "input_key", "environment", "agent", *PLACE)
    named = kept.with_columns(pl.coalesce("environment", "agent"))
    tasks = named.unique(["task_key", "input_key"], keep="first", maintain_order=True)

    def prompts() -> Iterator[Prompt]:
        for task, row, environment, *place in tasks.select("task_key", "input_key", "environment", *PLACE).iter_rows():
            yield Prompt(task, row, environment, prompt_text(read_rollout(Origin(*place)).prompt))

    keys = tasks["task_key"]
    return {
        keys[index]: Overlapping(found.by, f"{found.file}:{found.line}", found.share)
        for index, found in find_overlaps(prompts(), held_out).items()
    }


def contaminated_rows(
    rows: pl.LazyFrame, reasons: pl.Series, overlapping: Mapping[str, Overlapping]
) -> Iterator[dict[str, object]]:
    """What `contaminated.jsonl` says of each dropped rollout."""
    columns = ("row_id", "file", "line", "task_key")
    for values in rows.select(columns).collect().filter(reasons == "contaminated").iter_rows():
        yield dict(zip(columns, values, strict=True)) | overlapping[values[-1]]._asdict()
