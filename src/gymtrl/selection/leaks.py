"""Which tasks that a model is to be tried on may have been trained on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import polars as pl

from gymtrl.errors import UserError
from gymtrl.workspace.artefact import MANIFEST, Manifest, read_manifest

from .contamination import MOST_TASKS, Prompt, find_overlaps, hash_words, plain_words
from .decision import TRAIN
from .framing import Edges, Framed
from .held_out import HeldOut, frame_text, held_out_texts, prompt_text
from .lines import read_rollout
from .pool import Candidate, open_pool
from .task_clusters import task_clusters

_WHOLE = 1.0

_Shared = Literal["task_key", "input_key", "text", "cluster"]


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
    by: _Shared
    rollout: str


def find_leaks(tasks: Path, source: Path) -> list[Leak]:
    """Finds tasks that may have been trained on, themselves or others of their cluster.

    A text is shared if

    - all of it is that is no boilerplate, see `contamination.find_overlaps`; or
    - it is the same but for words that all prompts of an environment begin or end with, on the training side or among
      the tasks; see `framing.Framed.same`. So a question is found whose harness puts other words around it, unless both
      sides put some around a question of fewer than 13 words.

    What the user says is compared, and the whole prompt where many tasks have the same user turns and differ in a
    system prompt that is no other task's. A task of 5 to 12 words counts as shared where they are half of a prompt.

    Args:
        tasks (`Path`): JSONL of Gym input rows.
        source (`Path`): What a dataset was made from: a filter folder, of which every rollout counts that is not held
            out and that some objective may learn from, whether it was kept or not; or rollouts, of which all count.
            Clusters are those that the filter was given.

    Returns:
        `list[Leak]`: At most one for each task, in the order of the lines.

    Raises:
        `UserError`: If a file is missing, holds no tasks, or is not what the filter wrote; if the clusters that the
            filter was given are not known any more; if there are no leaks so far as is known, and the cluster of a
            task is not known.
    """
    held_out = held_out_texts(tasks)
    manifest = read_manifest(source) if (source / MANIFEST).is_file() else None
    filtered = manifest if manifest is not None and manifest.verb == "filter" else None
    with TemporaryDirectory() as work:
        pool = open_pool(source, Path(work))
        rows = pool.rows.filter(pl.col("task_key").is_not_null(), pl.col("side") == TRAIN)
        if filtered is not None:
            rows = rows.filter(pl.col("reason").is_null() | pl.col("cut") | pl.col("kept"))
        rows = rows.unique(["task_key", "input_key", "cluster_key"], keep="first", maintain_order=True)
        trained = pool.candidates(rows["index"])
        found, unknown = _of_clusters(tasks, source, filtered, pool.rows, trained)
        found |= _of_texts(held_out, trained)
    if unknown and not found:
        raise UserError(
            f"nothing tells the cluster of {len(unknown)} tasks in {tasks}, such as line {unknown[0]}, so whether "
            f"others of their clusters in {source} were trained on cannot be told",
            remedy="name the cluster in each row, or in the cluster file by input_key; or validate on tasks whose "
            "rollouts were filtered, such as heldout_inputs.jsonl, or pass --no-leak-check to validate all the same",
        )
    return [found[line] for line in sorted(found)]


def _of_clusters(
    tasks: Path, source: Path, filtered: Manifest | None, rows: pl.DataFrame, trained: Sequence[Candidate]
) -> tuple[dict[int, Leak], list[int]]:
    """What others of its cluster betray, by line; and the lines whose clusters nothing tells."""
    name = filtered.settings.get("cluster") if filtered is not None else None
    rollouts = {one.cluster_key: one for one in reversed(trained)}
    found, unknown = {}, []
    for line, clusters in task_clusters(tasks, source, name, rows):
        if clusters is None:
            unknown.append(line)
            continue
        leaking = next((rollouts[key] for key in sorted(clusters) if key in rollouts), None)
        if leaking is not None:
            found[line] = _leak(line, "cluster", leaking)
    return found, unknown


@dataclass
class _Said:
    """What the prompts of the training side say, as hashes.

    Attributes:
        frames (`dict[int, set[int]]`): What stands around each user text.
        texts (`dict[int, set[int]]`): User texts that each frame stands around, two at most.
        edges (`dict[str | None, Edges]`): By environment.
    """

    frames: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    texts: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    edges: defaultdict[str | None, Edges] = field(default_factory=lambda: defaultdict(Edges))

    def add(self, environment: str | None, text: str, frame: str) -> None:
        words = plain_words(text)
        said, around = hash_words(words), hash_words(plain_words(frame))
        self.edges[environment].add(words)
        self.frames[said].add(around)
        if len(self.texts[around]) < 2:
            self.texts[around].add(said)

    def unasked(self) -> set[int]:
        """User texts that ask nothing by themselves: those of many tasks whose frames stand around nothing else."""
        most = min(MOST_TASKS, max(2, sum(map(len, self.frames.values())) // 2))
        return {
            said
            for said, frames in self.frames.items()
            if len(frames) > most and sum(len(self.texts[around]) == 1 for around in frames) > most
        }


def _of_texts(held_out: Sequence[HeldOut], trained: Sequence[Candidate]) -> dict[int, Leak]:
    """Tasks that the training side has, by their keys or by what they say, by line."""
    said = _Said()
    for environment, _, text, frame in _prompts(trained):
        said.add(environment, text, frame)
    unasked = said.unasked()

    def asked(text: str, frame: str) -> str:
        return f"{frame}\n{text}" if unasked and hash_words(plain_words(text)) in unasked else text

    left = [one._replace(text=asked(one.text, one.frame)) for one in held_out]
    found: dict[int, Leak] = {}

    def take(new: Mapping[int, Leak]) -> bool:
        """Notes leaks, and those of equal tasks, and goes on with the others."""
        nonlocal left
        found.update(new)
        marks = {mark: found[one.line].rollout for one in left if one.line in new for mark in _marks(one)}
        for one in left:
            same = next((mark for mark in _marks(one) if mark in marks), None)
            if same is not None and one.line not in found:
                found[one.line] = Leak(one.line, same[0], marks[same])
        left = [one for one in left if one.line not in found]
        return bool(new)

    # A prompt tells of one task that it overlaps; where several do, the others show once that one is left out.
    while left and take(_overlapping(left, trained, asked)):
        pass
    take(_framed(left, trained, said, unasked))
    return found


def _marks(one: HeldOut) -> list[tuple[_Shared, str]]:
    """What tasks that are the same have in common."""
    marks: tuple[tuple[_Shared, str | None], ...] = (
        ("task_key", one.task_key),
        ("input_key", one.input_key),
        ("text", one.text),
    )
    return [(by, mark) for by, mark in marks if mark]


def _overlapping(
    held_out: Sequence[HeldOut], trained: Sequence[Candidate], asked: Callable[[str, str], str]
) -> dict[int, Leak]:
    prompts = (
        Prompt(one.task_key, one.input_key, environment, asked(text, frame))
        for environment, one, text, frame in _prompts(trained)
    )
    return {
        overlap.line: _leak(overlap.line, "text" if overlap.by == "ngram" else overlap.by, trained[index])
        for index, overlap in find_overlaps(prompts, held_out).items()
        if overlap.share == _WHOLE
    }


def _framed(
    held_out: Sequence[HeldOut], trained: Sequence[Candidate], said: _Said, unasked: set[int]
) -> dict[int, Leak]:
    words = [plain_words(one.text) for one in held_out]
    edges: defaultdict[str | None, Edges] = defaultdict(Edges)
    for one, said_there in zip(held_out, words, strict=True):
        edges[one.agent].add(said_there)
    framed = Framed()
    for one, said_there in zip(held_out, words, strict=True):
        framed.add(one.line, said_there, edges[one.agent])
    found: dict[int, Leak] = {}
    for environment, candidate, text, _ in _prompts(trained) if held_out else ():
        asks = plain_words(text)
        if hash_words(asks) not in unasked:
            for line in framed.same(asks, said.edges[environment]):
                found.setdefault(line, _leak(line, "text", candidate))
    return found


def _prompts(trained: Sequence[Candidate]) -> Iterator[tuple[str | None, Candidate, str, str]]:
    """Environment or agent, rollout, what the user says and what stands around it."""
    for one in trained:
        rollout = read_rollout(one.origin)
        yield rollout.environment or rollout.agent, one, prompt_text(rollout.prompt), frame_text(rollout.prompt)


def _leak(line: int, by: _Shared, trained: Candidate) -> Leak:
    return Leak(line, by, f"{trained.file}:{trained.line}")
