"""One collection read once into columns: who was asked what, what came of it, what it took, and where it stands."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    unread: Counter[str] = Counter()
    lines = skipped = 0
    for line in read_lines(files, cluster=cluster):
        lines += 1
        rollout = line.rollout
        if rollout is not None:
            fold.add(rollout, _VALID)
        elif line.verdict == "skip":
            skipped += 1
        elif line.reason != "line_too_long" and (rollout := read_asked(line.origin, cluster=cluster)) is not None:
            fold.add(rollout, _REFUSED, line.reason)
        else:
            unread[line.reason] += 1
    whole, numbers, row_ids = fold.columns()
    states = _without_duplicates(whole, row_ids)
    kept = states <= _REFUSED
    left_out = unread + Counter({reason: int(np.sum(states == state)) for state, reason in _REASONS.items()})
    name = ", ".join(map(str, inputs))
    if not kept.any():
        raise _no_value(name, metric, left_out)
    side = Side(
        name=name,
        lines=lines,
        rollouts=int(kept.sum()),
        refused=int(np.sum(states == _REFUSED)),
        left_out=dict(left_out),
        skipped=skipped,
        failed_attempts=dict(sum((Counter(count_failures(file)) for file in files), Counter())),
        missing=_missing(files, cluster, fold.files, whole),
        refused_by=_counted(fold.reasons, whole[_REASON, states == _REFUSED]),
        sampling={name: tuple(sorted(ways, key=str)) for name, ways in fold.sampling.items()},
        unread=unread.total(),
    )
    return Collection(
        side,
        fold.asked,
        whole[_CODE, kept],
        numbers[0, kept],
        numbers[1:, kept],
        list(fold.files),
        whole[_FILE : _FILE + 4, kept],
        row_ids[kept],
        fold.sampling,
    )


_VALID, _REFUSED, _DUPLICATE, _MASKED, _NO_VALUE, _NOT_FINITE = range(6)
_REASONS = {
    _DUPLICATE: "duplicate",
    _MASKED: "masked",
    _NO_VALUE: "value_missing",
    _NOT_FINITE: "value_not_finite",
}
_STATE, _REASON, _CODE, _TASK, _REPEAT, _FILE = range(6)  # rows of the whole numbers; line, offset, length follow
_WIDTH = 9
_UNNUMBERED = -(2**63)


class _Fold:
    """The columns while they grow: plain numbers, of every rollout."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.asked: list[Asked] = []
        self.files: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.sampling: dict[str, set[Sampling]] = {}
        self._whole, self._numbers, self._row_ids = array("q"), array("d"), array("Q")
        self._codes: dict[tuple[str, str, str | None], int] = {}
        self._sampled: tuple[str, Sampling] | None = None

    def add(self, rollout: Rollout, state: int, reason: str = "") -> None:
        """Adds a rollout, valid or refused for a reason."""
        origin, task, repeat = rollout.origin, rollout.task_index, rollout.rollout_index
        environment = rollout.agent or rollout.environment or ""
        sampled = (environment, rollout.sampling)
        if sampled != self._sampled:
            self._sampled = sampled
            self.sampling.setdefault(environment, set()).add(rollout.sampling)
        key = (environment, rollout.task_key, rollout.input_key)
        code = self._codes.get(key)
        if code is None:
            code = self._codes[key] = len(self.asked)
            self.asked.append(_asked(rollout, environment))
        value = math.nan
        if rollout.masked:
            state = _MASKED
        elif (measured := measure(self.metric, rollout, _row_of)) is None:
            state = _NO_VALUE
        elif not math.isfinite(measured):
            state = _NOT_FINITE
        else:
            value = measured
        if task is None or repeat is None:
            task = repeat = _UNNUMBERED
        file = self.files.setdefault(origin.file, len(self.files))
        why = self.reasons.setdefault(reason, len(self.reasons))
        self._whole.extend((state, why, code, task, repeat, file, origin.line, origin.offset, origin.length))
        self._numbers.extend((value, *measures(rollout)))
        self._row_ids.append(int(origin.row_id, 16))

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint64]]:
        """Whole numbers, values with measures, and row ids, one column a rollout."""
        return (
            np.array(self._whole, dtype=np.int64).reshape(-1, _WIDTH).T,
            np.array(self._numbers, dtype=np.float64).reshape(-1, 1 + len(MEASURES)).T,
            np.array(self._row_ids, dtype=np.uint64),
        )


def _without_duplicates(whole: NDArray[np.int64], row_ids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The states, in which of rollouts that are there twice only the first with a valid value keeps its own."""
    states: NDArray[np.int64] = whole[_STATE].copy()
    valid = np.flatnonzero(states <= _REFUSED)
    _, first = np.unique(row_ids[valid], return_index=True)
    once = valid[np.sort(first)]
    numbered = once[whole[_TASK, once] != _UNNUMBERED]
    _, first = np.unique(whole[[_FILE, _CODE, _TASK, _REPEAT]][:, numbered], axis=1, return_index=True)
    again = np.setdiff1d(numbered, numbered[first])
    states[np.setdiff1d(valid, once)] = _DUPLICATE
    states[again] = _DUPLICATE
    return states


def _row_of(rollout: Rollout) -> Any:
    return decode_json(read_bytes(rollout.origin))


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


def _counted(names: Mapping[str, int], places: NDArray[np.int64]) -> dict[str, int]:
    """How often each name occurs that does."""
    numbers = np.bincount(places, minlength=len(names)).tolist()
    return {name: numbers[place] for name, place in names.items() if numbers[place]}


def _missing(
    files: Sequence[Path], cluster: str | None, places: Mapping[str, int], whole: NDArray[np.int64]
) -> int | None:
    """Rollouts that the inputs beside the files ask for and that stand in no line that can be read."""
    asked = {str(file): load_sidecar(file, cluster).rows.keys() for file in files}
    if not any(asked.values()):
        return None
    missing = 0
    for file, rows in asked.items():
        here = whole[[_TASK, _REPEAT]][:, whole[_FILE] == places.get(file, -1)]
        missing += len(rows - set(zip(*here.tolist(), strict=True)))
    return missing


def _no_value(name: str, metric: Metric, left_out: Counter[str]) -> UserError:
    reasons = ", ".join(f"{reason} {number}" for reason, number in left_out.most_common(4))
    what = "reward" if metric.path == "reward" else f"{metric.path!r}"
    return UserError(
        f"{name} holds no rollout with a valid {what}" + (f": {reasons}" if reasons else ""),
        remedy="'gymtrl inspect' shows what is in it"
        + ("" if metric.path == "reward" else f"; --metric takes {metric.path!r} as a path into the row"),
    )
