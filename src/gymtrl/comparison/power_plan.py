"""From somebody's rollouts to the tasks and repeats that a comparison of such rollouts needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from gymtrl.comparison.collection import Collection, read_collection
from gymtrl.comparison.estimate import ROUNDING
from gymtrl.comparison.metric import Metric
from gymtrl.comparison.pairing import Half, Pairing, pair
from gymtrl.comparison.power import (
    TaskScores,
    Variance,
    detectable,
    noise_of_means,
    normal_tasks,
    repeats_needed,
    tasks_needed,
    variance_between_tasks,
    variance_within_tasks,
)
from gymtrl.comparison.power_settings import PowerSettings
from gymtrl.errors import UserError

_TASKS = (50, 100, 200, 500, 1000, 2000)
_REPEATS = (1, 2, 4, 8, 16)
_MOST_TASKS = 1e9
_FEW_TASKS = 30  # a variance from fewer is uncertain by a third or more

# How alike the true scores of a task are before and after, from one collection that cannot tell. In between stands the
# one that is taken.
_CORRELATIONS = (0.9, 0.5, 0.0)
_TAKEN = 0.5


class Needed(msgspec.Struct, frozen=True):
    """What shows the effect, under one assumption.

    Attributes:
        correlation (`float`, *optional*): Assumed between the true scores of tasks before and after; `None` where the
            scatter of the differences was measured.
        variance (`Variance`): What makes the differences of tasks scatter.
        tasks (`tuple[int, ...]`): Tasks that are needed, for each number of repeats.
    """

    correlation: float | None
    variance: Variance
    tasks: tuple[int, ...]


class PowerPlan(msgspec.Struct, frozen=True):
    """How many tasks and repeats show an effect, and what others could show.

    Attributes:
        effect (`float`): The effect that is to be shown.
        measured_tasks (`int`): Tasks of the rollouts that the variance is from.
        repeats (`tuple[int, ...]`): Rollouts of each task on each side.
        needed (`tuple[Needed, ...]`): Tasks needed with these, under each assumption.
        taken (`Needed`): The one that the rest is from.
        tasks (`tuple[int, ...]`): Numbers of tasks.
        detectable (`tuple[tuple[float, ...], ...]`): The smallest effect that each of them shows with each number of
            repeats, four times in five.
        repeats_needed (`int`, *optional*): Repeats with which `--tasks` shows the effect, if any do and it was given.
        unlimited (`float`, *optional*): What `--tasks` would show with any number of repeats, if it was given.
        notes (`tuple[str, ...]`): What was assumed or makes the answer uncertain.
    """

    effect: float
    measured_tasks: int
    repeats: tuple[int, ...]
    needed: tuple[Needed, ...]
    taken: Needed
    tasks: tuple[int, ...]
    detectable: tuple[tuple[float, ...], ...]
    repeats_needed: int | None
    unlimited: float | None
    notes: tuple[str, ...]


def plan_power(before: Sequence[Path], after: Sequence[Path] = (), *, settings: PowerSettings) -> PowerPlan:
    """Tells what a comparison needs, from the variance in rollouts that are there.

    With two collections of the same tasks the scatter of the tasks' differences is measured. With one it is not known:
    `2 * tau^2 * (1 - r)` is taken, with tau^2 the variance of the tasks' true scores and r their correlation before and
    after, which is assumed. What counts and what is paired is the same as in `compare`.

    Args:
        before (`Sequence[Path]`): Rollout files.
        after (`Sequence[Path]`, *optional*): Rollout files of the same tasks by another model.
        settings (`PowerSettings`): The effect, and the tasks or repeats that there are.

    Raises:
        `UserError`: Fewer than two clusters of tasks, no two rollouts of a task, or rewards that are all equal; what
            `compare` refuses of two collections.
    """
    sides = [read_collection(paths, Metric("reward"), cluster=settings.cluster) for paths in (before, after) if paths]
    pairing = pair(sides[0], sides[-1])
    first, second = _scores(sides[0], pairing, pairing.before), _scores(sides[-1], pairing, pairing.after)
    with np.errstate(over="ignore", invalid="ignore"):  # rewards may be of any size; what comes of it is looked at
        variances, notes = _paired(first, second) if len(sides) == 2 else _single(first)
    if lacking := sum(unpaired.tasks for unpaired in pairing.unpaired):
        what = "partner" if len(sides) > 1 else "valid reward"
        notes = (*notes, f"{lacking} tasks have no {what} and were left out")
    n = len(first)
    if n < _FEW_TASKS:
        notes = (*notes, f"the variance is from {n} tasks only: take the numbers as rough")
    repeats = (settings.repeats,) if settings.repeats else _REPEATS
    tasks = (settings.tasks,) if settings.tasks else _TASKS
    for variance in variances.values():
        _refuse_out_of_sight(variance, settings.effect, repeats[0])
    needed = tuple(
        Needed(r, variance, tuple(tasks_needed(variance, settings.effect, k) for k in repeats))
        for r, variance in variances.items()
    )
    taken = next(one for one in needed if one.correlation in (None, _TAKEN))
    return PowerPlan(
        effect=settings.effect,
        measured_tasks=n,
        repeats=repeats,
        needed=needed,
        taken=taken,
        tasks=tasks,
        detectable=tuple(tuple(detectable(taken.variance, t, k) for k in repeats) for t in tasks),
        repeats_needed=repeats_needed(taken.variance, settings.effect, settings.tasks) if settings.tasks else None,
        unlimited=detectable(taken.variance, settings.tasks, math.inf) if settings.tasks else None,
        notes=notes,
    )


_Variances = dict[float | None, Variance]


def _single(scores: Sequence[TaskScores]) -> tuple[_Variances, tuple[str, ...]]:
    clusters = _clusters(scores)
    within = variance_within_tasks(scores)
    if within is None:
        raise UserError(
            "every task has one rollout: what tasks differ by cannot be told from what rollouts of one differ by",
            remedy="collect two or more rollouts of some tasks, or give a second collection of the same tasks",
        )
    means = [_mean(task) for task in scores]
    true, freedom = variance_between_tasks(means, clusters, noise_of_means(scores, within))
    _refuse_constant(true + within, scores)
    variances: _Variances = {r: Variance(2 * true * (1 - r), 2 * within, freedom) for r in _CORRELATIONS}
    note = (
        "what training does to one task more than to another cannot be seen in one collection; taken is a correlation "
        f"of {_TAKEN:g} between tasks' true scores before and after. A second collection of the same tasks measures it"
    )
    return variances, (note,)


def _paired(a: Sequence[TaskScores], b: Sequence[TaskScores]) -> tuple[_Variances, tuple[str, ...]]:
    clusters = _clusters(a)
    notes = []
    within_a, within_b = variance_within_tasks(a), variance_within_tasks(b)
    if within_a is None and within_b is None:
        notes.append("every task has one rollout a side: repeats are taken to be of no help, which they may well be")
    elif within_a is None or within_b is None:
        notes.append("tasks of one side have one rollout each: the other side's variance is taken for both")
    # 0 where neither is known: all of the variance then counts as between tasks, which asks for too many tasks at most.
    known_a, known_b = within_a or within_b or 0.0, within_b or within_a or 0.0
    changes = [_mean(y) - _mean(x) for x, y in zip(a, b, strict=True)]
    noise = noise_of_means(a, known_a) + noise_of_means(b, known_b)
    between, freedom = variance_between_tasks(changes, clusters, noise)
    _refuse_constant(between + known_a + known_b, [*a, *b])
    return {None: Variance(between, known_a + known_b, freedom)}, tuple(notes)


def _scores(side: Collection, pairing: Pairing, half: Half) -> list[TaskScores]:
    """The rewards of one side, one place a task of the pairing."""
    tasks = [TaskScores(asked.cluster_key, []) for asked in pairing.asked]
    for task, reward in zip(half.tasks.tolist(), side.values[half.rows].tolist(), strict=True):
        tasks[task].rewards.append(reward)
    return tasks


def _clusters(tasks: Sequence[TaskScores]) -> list[str]:
    found = [task.cluster for task in tasks]
    if len(set(found)) < 2:
        raise UserError(
            f"{len(found)} tasks with valid rewards" + (", all in one cluster" if len(found) > 1 else ""),
            remedy="a variance needs several independent tasks; see 'gymtrl inspect' on what is there",
        )
    return found


def _refuse_constant(variance: float, tasks: Sequence[TaskScores]) -> None:
    largest = max(abs(reward) for task in tasks for reward in task.rewards)
    if math.sqrt(variance) <= ROUNDING * largest:
        raise UserError(
            "nothing scatters: rewards do not differ between rollouts of a task, nor changes between tasks",
            remedy="look at the rewards with 'gymtrl inspect'; harder or easier tasks may differ",
        )


def _refuse_out_of_sight(variance: Variance, effect: float, repeats: int) -> None:
    if not normal_tasks(variance, effect, repeats) < _MOST_TASKS:
        raise UserError(
            f"{effect:g} cannot be told where rewards scatter like these: it takes more than a billion tasks",
            remedy="--effect is in units of the reward; look at the rewards with 'gymtrl inspect'",
        )


def _mean(task: TaskScores) -> float:
    return float(np.mean(task.rewards))
