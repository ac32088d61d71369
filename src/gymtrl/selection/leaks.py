"""Which tasks that a model is to be tried on may have been trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import polars as pl

from gymtrl.rollouts.codec import decode_json
from gymtrl.rollouts.keys import input_key, named_cluster
from gymtrl.workspace.artefact import MANIFEST, read_manifest

from .clusters import is_cluster_file, read_clusters
from .contamination import Prompt, find_overlaps
from .decision import TRAIN
from .held_out import HeldOut, held_out_texts, prompt_text
from .lines import read_rollout
from .pool import Candidate, open_pool

_WHOLE = 1.0


@dataclass(frozen=True)
class Leak:
    """A task that may have been trained on.

    Attributes:
        line (`int`): Where it stands, from 1.
        by (`str`): What it shares with the training side: `task_key`, `input_key`, `text` (what the user says, whatever
            a harness has put before it) or `cluster`.
        rollout (`str`): A rollout of the training side with which it does, `FILE:LINE`.
    """

    line: int
    by: Literal["task_key", "input_key", "text", "cluster"]
    rollout: str


def find_leaks(tasks: Path, source: Path) -> list[Leak]:
    """Finds tasks that may have been trained on, themselves or others of their cluster.

    Args:
        tasks (`Path`): JSONL of Gym input rows.
        source (`Path`): What a dataset was made from: a filter folder, of which every rollout counts that is not held
            out, since some objectives learn from what was dropped; or rollouts, of which all count. Clusters are those
            that the filter was given.

    Returns:
        `list[Leak]`: At most one for each task, in the order of the lines. A text is shared if all of it is that is no
        boilerplate; see `contamination.find_overlaps`.

    Raises:
        `UserError`: If a file is missing, holds no tasks, or is not what the filter wrote.
    """
    held_out = held_out_texts(tasks)
    with TemporaryDirectory() as work:
        pool = open_pool(source, Path(work))
        rows = pool.rows.filter(pl.col("task_key").is_not_null(), pl.col("side") == TRAIN)
        rows = rows.unique(["task_key", "input_key", "cluster_key"], keep="first", maintain_order=True)
        trained = pool.candidates(rows["index"])
        found = {leak.line: leak for leak in _of_clusters(tasks, source, trained)}
        # A prompt tells of one task that it overlaps; where several do, the others show once that one is left out.
        while new := {leak.line: leak for leak in _of_tasks(held_out, trained)}:
            found |= new
            held_out = [one for one in held_out if one.line not in new]
    return [found[line] for line in sorted(found)]


def _of_tasks(held_out: Sequence[HeldOut], trained: Sequence[Candidate]) -> Iterator[Leak]:
    def prompts() -> Iterator[Prompt]:
        for one in trained:
            rollout = read_rollout(one.origin)
            name = rollout.environment or rollout.agent
            yield Prompt(one.task_key, one.input_key, name, prompt_text(rollout.prompt))

    for index, overlap in find_overlaps(prompts(), held_out).items():
        if overlap.share == _WHOLE:
            by = "text" if overlap.by == "ngram" else overlap.by
            yield Leak(overlap.line, by, f"{trained[index].file}:{trained[index].line}")


def _of_clusters(tasks: Path, source: Path, trained: Sequence[Candidate]) -> Iterator[Leak]:
    name = read_manifest(source).settings["cluster"] if (source / MANIFEST).is_file() else None
    if name is None:
        return
    clusters = read_clusters(Path(name)) if is_cluster_file(name) else {}
    rollouts = {one.cluster_key: one for one in reversed(trained)}
    with tasks.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row: Any = decode_json(line) if line.strip() else {}
            named = clusters.get(input_key(row)) if clusters else named_cluster(name, row, None)
            if named in rollouts:
                yield Leak(number, "cluster", f"{rollouts[named].file}:{rollouts[named].line}")
