"""One collection read once into columns: who was asked what, what came of it, what it took, and where it stands."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gymtrl.comparison.measures import MEASURES, measures
from gymtrl.comparison.metric import Metric, measure
from gymtrl.comparison.record import Side
from gymtrl.errors import UserError
from gymtrl.rollouts.codec import decode_json, digest
from gymtrl.rollouts.inputs import expand_inputs
from gymtrl.rollouts.reader import read_asked, read_bytes, read_lines
from gymtrl.rollouts.record import Message, Origin, Rollout, Sampling
from gymtrl.rollouts.sidecars import count_failures, load_sidecar

_QUESTION_CHARS = 200


class Asked(NamedTuple):
    """What was asked: the task with what may tell it from others that ask the same question.

    Attributes:
        environment (`str`): The agent's name.
        task_key (`str`), input_key (`str`, *optional*), cluster_key (`str`): As in the record.
        question (`str`): The beginning of the last user message.
        parts (`dict[str, str]`): Digests of the question, the system prompt, the tool list and the history.
        named_cluster (`bool`): The cluster is one that the row names, where the user asked for one.
        place (`str`): Its first line, as `file:line`.
    """

    environment: str
    task_key: str
    input_key: str | None
    cluster_key: str
    question: str
    parts: dict[str, str]
    named_cluster: bool
    place: str


class Collection(NamedTuple):
    """A collection in columns, one place in each array a rollout with a valid value.

    Attributes:
        side (`Side`): What became of its lines.
        asked (`list[Asked]`): Everything that was asked, also where no rollout has a valid value.
        codes (`ndarray` of `int64`): Which of `asked`.
        values (`ndarray` of `float64`): The metric.
        measures (`ndarray` of shape (len(MEASURES), n)): What it took and how it went; NaN where that is not known.
        files (`list[str]`): The files that the rollouts stand in.
        places (`ndarray` of shape (4, n), `int64`): File, line, offset and length.
        row_ids (`ndarray` of `uint64`): The row ids as numbers.
        sampling (`dict[str, set[Sampling]]`): How the policy was asked to sample, by environment.
    """

    side: Side
    asked: list[Asked]
    codes: NDArray[np.int64]
    values: NDArray[np.float64]
    measures: NDArray[np.float64]
    files: list[str]
    places: NDArray[np.int64]
    row_ids: NDArray[np.uint64]
    sampling: dict[str, set[Sampling]]

    def origin(self, place: int) -> Origin:
        """Where a rollout stands."""
        file, line, offset, length = map(int, self.places[:, place])
        return Origin(self.files[file], line, offset, length, f"{int(self.row_ids[place]):016x}")


def read_collection(inputs: Sequence[Path], metric: Metric, *, cluster: str | None = None) -> Collection:
    """Reads a collection; memory grows with the number of rollouts, not with their size.

    A rollout whose answer is no sound chat counts with its reward: the model failed. One that the world failed (masked,
    or a failed attempt) or that has no finite value does not count. Of rollouts that are there twice, byte for byte or
    by their indexes, the first counts.

    Args:
        inputs (`Sequence[Path]`): Rollout files, or folders that hold them.
        metric (`Metric`): What is compared.
        cluster (`str`, *optional*): Dotted path that names the cluster of a row; else every task is its own.

    Raises:
        UserError: A file is missing, or none of the rollouts has the cluster, or a valid value of the metric.
    """
    files = expand_inputs(inputs)
    fold = _Fold(metric)
    lines = skipped = 0
    refused: Counter[str] = Counter()
    for line in read_lines(files, cluster=cluster):
        lines += 1
        rollout = line.rollout
        if rollout is not None:
            fold.add(rollout)
        elif line.verdict == "skip":
            skipped += 1
        elif line.reason != "line_too_long" and (rollout := read_asked(line.origin, cluster=cluster)) is not None:
            refused[line.reason] += fold.add(rollout)
        else:
            fold.left_out[line.reason] += 1
    name = ", ".join(map(str, inputs))
    if not fold.codes:
        raise _no_value(name, metric, fold)
    failed: Counter[str] = Counter()
    for file in files:
        failed.update(count_failures(file))
    side = Side(
        name=name,
        lines=lines,
        rollouts=len(fold.codes),
        refused=refused.total(),
        left_out=dict(fold.left_out),
        skipped=skipped,
        failed_attempts=dict(failed),
        missing=_missing(files, cluster, fold.found),
        refused_by=dict(+refused),
        sampling={name: tuple(sorted(ways, key=str)) for name, ways in fold.sampling.items()},
    )
    return Collection(
        side,
        fold.asked,
        np.array(fold.codes, dtype=np.int64),
        np.array(fold.values),
        np.array(fold.measures).reshape(-1, len(MEASURES)).T,
        fold.files,
        np.array(fold.places, dtype=np.int64).reshape(-1, 4).T,
        np.array(fold.row_ids, dtype=np.uint64),
        fold.sampling,
    )


class _Fold:
    """The columns while they grow."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.asked: list[Asked] = []
        self.codes, self.values, self.measures = array("q"), array("d"), array("d")
        self.places, self.row_ids = array("q"), array("Q")
        self.left_out: Counter[str] = Counter()
        self.sampling: dict[str, set[Sampling]] = {}
        self.found: dict[str, set[tuple[int, int]]] = {}
        self._code: dict[tuple[str, str, str | None], int] = {}
        self._files: dict[str, int] = {}
        self._rows: set[int] = set()
        self._repeats: set[tuple[int, int, int | None, int | None]] = set()

    @property
    def files(self) -> list[str]:
        return list(self._files)

    def add(self, rollout: Rollout) -> bool:
        """Adds a rollout, or notes why it is left out; returns whether it counts."""
        origin, task, repeat = rollout.origin, rollout.task_index, rollout.rollout_index
        code = self._code_of(rollout)
        if task is not None and repeat is not None:
            self.found.setdefault(origin.file, set()).add((task, repeat))
        if rollout.masked:
            self.left_out["masked"] += 1
            return False
        value = measure(self.metric, rollout, _row_of(origin))
        if value is None or not math.isfinite(value):
            self.left_out["value_missing" if value is None else "value_not_finite"] += 1
            return False
        file = self._files.setdefault(origin.file, len(self._files))
        row = int(origin.row_id, 16)
        numbered = task is not None and repeat is not None
        if row in self._rows or (numbered and (file, code, task, repeat) in self._repeats):
            self.left_out["duplicate"] += 1
            return False
        self._rows.add(row)
        if numbered:
            self._repeats.add((file, code, task, repeat))
        self.codes.append(code)
        self.values.append(value)
        self.measures.extend(measures(rollout))
        self.places.extend((file, origin.line, origin.offset, origin.length))
        self.row_ids.append(row)
        return True

    def _code_of(self, rollout: Rollout) -> int:
        environment = rollout.agent or rollout.environment or ""
        key = (environment, rollout.task_key, rollout.input_key)
        code = self._code.get(key)
        if code is None:
            code = self._code[key] = len(self.asked)
            self.asked.append(_asked(rollout, environment))
        self.sampling.setdefault(environment, set()).add(rollout.sampling)
        return code


def _row_of(origin: Origin) -> Callable[[], Any]:
    return lambda: decode_json(read_bytes(origin))


def _asked(rollout: Rollout, environment: str) -> Asked:
    prompt = rollout.prompt
    last = next((i for i in reversed(range(len(prompt))) if prompt[i].role == "user"), None)
    question = "" if last is None else prompt[last].content
    rest = [message for i, message in enumerate(prompt) if i != last]
    parts = {
        "question": _digest(() if last is None else (prompt[last],)),
        "system prompt": _digest(m for m in rest if m.role in ("system", "developer")),
        "history": _digest(m for m in rest if m.role not in ("system", "developer")),
        "tool list": digest(rollout.tools),
    }
    short = question if len(question) <= _QUESTION_CHARS else question[: _QUESTION_CHARS - 1] + "…"
    named = "cluster_missing" not in rollout.flags
    keys = (rollout.task_key, rollout.input_key, rollout.cluster_key)
    return Asked(environment, *keys, short, parts, named, str(rollout.origin))


def _digest(messages: Iterable[Message]) -> str:
    shown = [(m.role, m.content, m.images, [(c.name, c.arguments_json) for c in m.tool_calls]) for m in messages]
    return hashlib.sha256(repr(shown).encode("utf-8", "surrogatepass")).hexdigest()


def _missing(files: Sequence[Path], cluster: str | None, found: dict[str, set[tuple[int, int]]]) -> int | None:
    """Rollouts that the inputs beside the files ask for and that have no line, as where a run was cut short."""
    asked = {str(file): load_sidecar(file, cluster).rows.keys() for file in files}
    if not any(asked.values()):
        return None
    return sum(len(rows - found.get(file, set())) for file, rows in asked.items())


def _no_value(name: str, metric: Metric, fold: _Fold) -> UserError:
    reasons = ", ".join(f"{reason} {number}" for reason, number in fold.left_out.most_common(4))
    what = "reward" if metric.path == "reward" else f"{metric.path!r}"
    return UserError(
        f"{name} holds no rollout with a valid {what}" + (f": {reasons}" if reasons else ""),
        remedy=f"'gymtrl inspect' shows what is in it; --metric takes {metric.path!r} as a path into the row",
    )
