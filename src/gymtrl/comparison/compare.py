"""Before against after: the same tasks, paired, with an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from gymtrl.comparison.collection import Collection, read_collection
from gymtrl.comparison.distribution import distributions
from gymtrl.comparison.effect import SURE_CLUSTERS, Scores, adjusted, costs, estimate, score
from gymtrl.comparison.metric import parse_metric
from gymtrl.comparison.pairing import Half, Pairing, pair
from gymtrl.comparison.record import Candidate, Comparison, Effect, Flip, Side, TaskDifference
from gymtrl.comparison.verdict import least_favourable, sentence
from gymtrl.errors import UserError


def compare_files(
    before: Sequence[Path],
    after: Sequence[Path],
    *,
    metric: str = "reward",
    cluster: str | None = None,
    min_effect: float = 0.0,
) -> Comparison:
    """Compares two collections of the same tasks; see `compare_candidates`.

    Args:
        before, after (`Sequence[Path]`): Rollout files, or folders that hold them.
        metric, cluster, min_effect: As in `compare_candidates`.
    """
    return compare_candidates(before, [after], metric=metric, cluster=cluster, min_effect=min_effect)


def compare_candidates(
    before: Sequence[Path],
    candidates: Sequence[Sequence[Path]],
    *,
    metric: str = "reward",
    cluster: str | None = None,
    min_effect: float = 0.0,
) -> Comparison:
    """Compares several collections with one of the same tasks.

    Tasks are linked by `input_key` where both sides have it, else by `task_key`; each counts with the mean of its
    rollouts. An environment is the tasks of one agent.

    Args:
        before (`Sequence[Path]`): Rollout files, or folders that hold them.
        candidates (`Sequence[Sequence[Path]]`): The same of each candidate.
        metric (`str`, *optional*, defaults to `"reward"`): What is compared: see `metric.parse_metric`.
        cluster (`str`, *optional*): Dotted path that names the cluster of a row; else every task is its own.
        min_effect (`float`, *optional*, defaults to 0): The smallest difference that counts, in units of the metric.

    Returns:
        `Comparison`: With one candidate for each of `candidates`, in order.

    Raises:
        UserError: No tasks in common, one cluster only, no valid values, or ones too large for an interval, or
            collections sampled differently; a `min_effect` that is no finite number from 0.
    """
    if not 0 <= min_effect < math.inf:
        raise UserError(f"min_effect is {min_effect:g}", remedy="pass a finite number, 0 or more")
    measured = parse_metric(metric)
    first = read_collection(before, measured, cluster=cluster)
    compared = [_compared(first, read_collection(files, measured, cluster=cluster), min_effect) for files in candidates]
    points = all(map(_within_one, [first, *(c.after for c in compared)]))
    done = [_candidate(first, one, points, min_effect) for one in _adjusted(compared)]
    return Comparison(
        outcome=least_favourable([candidate.outcome for candidate in done]),
        verdict="\n".join(candidate.verdict for candidate in done),
        metric=str(measured),
        min_effect=min_effect,
        points=points,
        before=first.side,
        candidates=tuple(done),
    )


class _Compared(NamedTuple):
    """A candidate with what is shown in all of its tasks and in each environment, if there are several."""

    after: Collection
    pairing: Pairing
    scores: Scores
    overall: Effect
    environments: tuple[Effect, ...]


def _compared(before: Collection, after: Collection, min_effect: float) -> _Compared:
    pairing = pair(before, after)
    scores = score(pairing, before, after)
    if len(np.unique(scores.clusters)) < 2:
        what = "share one task only" if len(pairing.keys) < 2 else "share the tasks of one cluster only"
        raise UserError(
            f"{before.side.name} and {after.side.name} {what}",
            remedy="an interval needs several independent tasks; collect more of them",
        )
    overall = estimate(scores, "", min_effect)
    if len(scores.names) == 1:
        return _Compared(after, pairing, scores, overall, ())
    here = ((name, scores.of(scores.environments == place)) for place, name in enumerate(scores.names))
    each = (estimate(some, name, min_effect) for name, some in here if len(np.unique(some.clusters)) > 1)
    return _Compared(after, pairing, scores, overall, tuple(each))


def _adjusted(compared: Sequence[_Compared]) -> Iterator[_Compared]:
    """Allows for there being several: the candidates are one family, the environments of all of them another.

    An environment that is alone in a candidate shows what all of its tasks do.
    """
    overall = adjusted([one.overall for one in compared])
    each = iter(adjusted([effect for one in compared for effect in one.environments]))
    for one, effect in zip(compared, overall, strict=True):
        environments = tuple(islice(each, len(one.environments)))
        if len(one.scores.names) == 1:
            environments = (msgspec.structs.replace(effect, environment=one.scores.names[0]),)
        yield one._replace(overall=effect, environments=environments)


def _candidate(before: Collection, compared: _Compared, points: bool, min_effect: float) -> Candidate:
    after, pairing, scores, overall, environments = compared
    took, habits = costs(pairing, before, after, scores)
    return Candidate(
        outcome=overall.outcome,
        verdict=sentence(overall, environments, points=points, min_effect=min_effect),
        after=after.side,
        overall=overall,
        environments=environments,
        costs=took,
        unpaired=pairing.unpaired,
        warnings=_warnings(before, compared),
        tasks=_tasks(pairing, scores),
        flips=_flips(pairing, scores, before, after),
        habits=habits,
        distributions=distributions(pairing, before, after),
    )


def _within_one(side: Collection) -> bool:
    return bool(side.values.min() >= 0 and side.values.max() <= 1)


def _tasks(pairing: Pairing, scores: Scores) -> tuple[TaskDifference, ...]:
    (before, after), (n_before, n_after) = scores.means.tolist(), scores.counts.tolist()
    tasks = [
        TaskDifference(key, asked.cluster_key, environment, asked.question, *numbers)
        for (environment, key), asked, *numbers in zip(
            pairing.keys, pairing.asked, before, after, n_before, n_after, strict=True
        )
    ]
    return tuple(sorted(tasks, key=lambda task: (task.after - task.before, task.environment, task.key)))


def _flips(pairing: Pairing, scores: Scores, before: Collection, after: Collection) -> tuple[Flip, ...]:
    """Fixed and broken tasks, the rollouts that show it first."""
    flips = scores.flips()
    first, second = (
        _rows_of(np.flatnonzero(flips), side, half) for side, half in ((before, pairing.before), (after, pairing.after))
    )
    found = []
    for task in np.flatnonzero(flips).tolist():
        fixed = bool(flips[task] > 0)
        was = sorted(first[task], key=lambda row: before.values[row], reverse=not fixed)
        became = sorted(second[task], key=lambda row: after.values[row], reverse=fixed)
        origins = (tuple(map(before.origin, was)), tuple(map(after.origin, became)))
        found.append(Flip(*pairing.keys[task], "fixed" if fixed else "broken", *origins))
    return tuple(found)


def _rows_of(tasks: NDArray[np.int64], side: Collection, half: Half) -> dict[int, list[int]]:
    """The places of some tasks' rollouts in the columns of a collection."""
    found: dict[int, list[int]] = {task: [] for task in tasks.tolist()}
    wanted = np.isin(half.tasks, tasks)
    for row, task in zip(half.rows[wanted].tolist(), half.tasks[wanted].tolist(), strict=True):
        found[task].append(row)
    return found


def _warnings(before: Collection, compared: _Compared) -> tuple[str, ...]:
    after, pairing, scores, overall, environments = compared
    difference, found = overall.difference, []
    if difference.clusters < SURE_CLUSTERS:
        found.append(f"only {difference.clusters} independent clusters: the interval may be too narrow")
    if difference.alike:
        found.append("every task changed by the same amount: the interval has no width")
    named = {effect.environment for effect in environments}
    found += [f"{name} has one cluster only: no interval of its own" for name in scores.names if name not in named]
    if uneven := int(np.sum(scores.counts[0] != scores.counts[1])):
        found.append(f"{uneven} tasks have unequal numbers of rollouts before and after")
    if lacking := sum(unpaired.tasks for unpaired in pairing.unpaired):
        found.append(f"{lacking} tasks have no partner and are left out")
    if alone := sum(not asked.named_cluster for asked in pairing.asked):
        found.append(f"{alone} tasks have no value at the path of the clusters; each counts as a cluster of its own")
    if same := len(np.intersect1d(before.row_ids, after.row_ids)):
        found.append(f"{same} rollouts are the same, byte for byte, before and after")
    for word, side in (("before", before.side), ("after", after.side)):
        found += _lost(word, side)
    return tuple(found)


def _lost(word: str, side: Side) -> list[str]:
    """What is not there of one side."""
    found = []
    if side.missing:
        cut = ": the run was cut short" if side.missing > side.unread else ""
        found.append(f"{side.missing} rollouts {word} were asked for and stand in no line that can be read{cut}")
    if duplicates := side.left_out.get("duplicate"):
        found.append(f"{duplicates} rollouts {word} are there twice and count once")
    others = {reason: number for reason, number in side.left_out.items() if reason != "duplicate"}
    if others:
        reasons = ", ".join(f"{reason} {number}" for reason, number in sorted(others.items()))
        found.append(f"{sum(others.values())} lines {word} have no valid value and are left out: {reasons}")
    return found
