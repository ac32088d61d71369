"""Before against after: the same tasks, paired, with an interval and a verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from gymtrl.comparison.estimate import LEVEL, MeanEstimate, cluster_mean, sign_flip_p
from gymtrl.errors import UserError
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Rollout

Outcome = Literal["improved", "regressed", "not shown"]
_FEW_CLUSTERS = 15  # below this an interval can be too narrow; the sign-flip test must then agree


class TaskDifference(msgspec.Struct, frozen=True):
    """One task, before and after: mean rewards over its rollouts.

    Attributes:
        key (`str`): The key that links the task's rollouts.
        cluster (`str`): Its cluster.
        question (`str`): The last user message, for a person.
        before, after (`float`): Mean rewards.
        n_before, n_after (`int`): Rollouts.
    """

    key: str
    cluster: str
    question: str
    before: float
    after: float
    n_before: int
    n_after: int


class Comparison(msgspec.Struct, frozen=True):
    """The result of comparing two collections.

    Attributes:
        outcome (`str`): `improved` or `regressed` where the interval lies on one side of zero and, below 15 clusters,
            the sign-flip test agrees; else `not shown`.
        verdict (`str`): The result in one sentence.
        difference (`MeanEstimate`): Mean over tasks of after minus before, in units of the reward.
        sign_flip_p (`float`): Two-sided p-value of that mean under sign flips of whole clusters.
        before, after (`MeanEstimate`): Mean rewards over the same tasks.
        better, worse, equal (`int`): Tasks by the sign of their difference.
        solved, lost (`int`): Flips: tasks whose majority of rollouts went from failing to passing, and the other way.
        pass_threshold (`float`): Reward at which a rollout counts as passing for the flips.
        only_before, only_after (`int`): Tasks that the other collection lacks; they are left out.
        left_out (`int`): Rollouts without a valid reward (masked, missing, not finite) or that could not be read.
        warnings (`tuple[str, ...]`): What makes the result less certain than the interval says.
        tasks (`tuple[TaskDifference, ...]`): Every task, by difference.
    """

    outcome: Outcome
    verdict: str
    difference: MeanEstimate
    sign_flip_p: float
    before: MeanEstimate
    after: MeanEstimate
    better: int
    worse: int
    equal: int
    solved: int
    lost: int
    pass_threshold: float
    only_before: int
    only_after: int
    left_out: int
    warnings: tuple[str, ...]
    tasks: tuple[TaskDifference, ...]


class _Side(msgspec.Struct):
    rollouts: dict[str, list[Rollout]]
    left_out: int


def compare_files(before: Sequence[Path], after: Sequence[Path], *, cluster: str | None = None) -> Comparison:
    """Compares two collections of the same tasks.

    Tasks are linked by `input_key` where both sides have it, else by `task_key`.

    Args:
        before, after (`Sequence[Path]`): Rollout files.
        cluster (`str`, *optional*): JSON path that names the cluster of a row; else every task is its own.

    Raises:
        UserError: No tasks in common, one cluster only, no valid rewards, or collections sampled differently.
    """
    return compare(
        [line.rollout for line in read_lines(before, cluster=cluster) if line.verdict != "skip"],
        [line.rollout for line in read_lines(after, cluster=cluster) if line.verdict != "skip"],
        names=(_names(before), _names(after)),
    )


def compare(
    before: Iterable[Rollout | None], after: Iterable[Rollout | None], *, names: tuple[str, str] = ("before", "after")
) -> Comparison:
    """Compares two collections of rollouts; `None` stands for a line that could not be read. See `compare_files`."""
    first, second = list(before), list(after)
    _refuse_different_sampling(first, second, names)
    by_input = all(r.input_key for r in (*first, *second) if r is not None)
    a, b = _by_task(first, by_input), _by_task(second, by_input)
    for side, name in ((a, names[0]), (b, names[1])):
        if not side.rollouts:
            raise UserError(f"{name} holds no rollout with a valid reward", remedy="see 'gymtrl inspect' on it")
    common = sorted(a.rollouts.keys() & b.rollouts.keys())
    if not common:
        raise UserError(
            f"{names[0]} and {names[1]} have no task in common",
            remedy="collect both on the same tasks: 'gymtrl validate' does",
        )
    tasks = [_task(key, a.rollouts[key], b.rollouts[key]) for key in common]
    clusters = [t.cluster for t in tasks]
    if len(set(clusters)) < 2:
        raise UserError(
            f"{names[0]} and {names[1]} share one task only" if len(tasks) < 2 else "all tasks are in one cluster",
            remedy="an interval needs several independent tasks; collect more of them",
        )
    changes = [t.after - t.before for t in tasks]
    difference, p = cluster_mean(changes, clusters), sign_flip_p(changes, clusters)
    outcome = _outcome(difference, p)
    threshold = _pass_threshold(a, b)
    solved, lost = _flips(common, a, b, threshold)
    return Comparison(
        outcome=outcome,
        verdict=_sentence(outcome, difference, p),
        difference=difference,
        sign_flip_p=p,
        before=cluster_mean([t.before for t in tasks], clusters),
        after=cluster_mean([t.after for t in tasks], clusters),
        better=sum(t.after > t.before for t in tasks),
        worse=sum(t.after < t.before for t in tasks),
        equal=sum(t.after == t.before for t in tasks),
        solved=solved,
        lost=lost,
        pass_threshold=threshold,
        only_before=len(a.rollouts.keys() - b.rollouts.keys()),
        only_after=len(b.rollouts.keys() - a.rollouts.keys()),
        left_out=a.left_out + b.left_out,
        warnings=_warnings(tasks, difference, a, b),
        tasks=tuple(sorted(tasks, key=lambda t: (t.after - t.before, t.key))),
    )


def _by_task(rollouts: Iterable[Rollout | None], by_input: bool) -> _Side:
    side = _Side(defaultdict(list), 0)
    for rollout in rollouts:
        if rollout is None or rollout.masked or rollout.reward is None or not math.isfinite(rollout.reward):
            side.left_out += 1
            continue
        side.rollouts[(rollout.input_key if by_input else None) or rollout.task_key].append(rollout)
    return side


def _task(key: str, before: Sequence[Rollout], after: Sequence[Rollout]) -> TaskDifference:
    question = next((m.content for m in reversed(before[0].prompt) if m.role == "user"), "")
    return TaskDifference(key, before[0].cluster_key, question, _mean(before), _mean(after), len(before), len(after))


def _mean(rollouts: Sequence[Rollout]) -> float:
    return math.fsum(r.reward or 0.0 for r in rollouts) / len(rollouts)


def _outcome(difference: MeanEstimate, p: float) -> Outcome:
    if difference.clusters < _FEW_CLUSTERS and p > 1 - LEVEL:
        return "not shown"
    if difference.low > 0:
        return "improved"
    return "regressed" if difference.high < 0 else "not shown"


def _sentence(outcome: Outcome, d: MeanEstimate, p: float) -> str:
    interval = f"{d.mean:+.3f} (95 % interval {d.low:+.3f} to {d.high:+.3f}, {d.n} tasks)"
    if outcome == "improved":
        return f"Improved: mean reward changed by {interval}."
    if outcome == "regressed":
        return f"Regressed: mean reward changed by {interval}."
    if d.low > 0 or d.high < 0 or d.standard_error == 0:
        return (
            f"Not shown: mean reward changed by {interval}; so few clusters cannot tell it from chance (p = {p:.2g})."
        )
    unseen = f"a change below {d.detectable:.3f} could well have stayed unseen"
    return f"Not shown: mean reward changed by {interval}; {unseen}."


def _pass_threshold(a: _Side, b: _Side) -> float:
    """The highest reward where rewards are binary, else the middle of their range."""
    rewards = {r.reward or 0.0 for side in (a, b) for group in side.rollouts.values() for r in group}
    return max(rewards) if len(rewards) <= 2 else (max(rewards) + min(rewards)) / 2


def _flips(keys: Sequence[str], a: _Side, b: _Side, threshold: float) -> tuple[int, int]:
    def passes(group: Sequence[Rollout]) -> bool:
        return sum((r.reward or 0.0) >= threshold for r in group) * 2 > len(group)

    pairs = [(passes(a.rollouts[k]), passes(b.rollouts[k])) for k in keys]
    return sum(not x and y for x, y in pairs), sum(x and not y for x, y in pairs)


def _warnings(tasks: Sequence[TaskDifference], d: MeanEstimate, a: _Side, b: _Side) -> tuple[str, ...]:
    found = []
    if d.clusters < _FEW_CLUSTERS:
        found.append(f"only {d.clusters} independent clusters: the interval may be too narrow")
    if d.standard_error == 0:
        found.append("every task changed by the same amount: the interval has no width")
    uneven = sum(t.n_before != t.n_after for t in tasks)
    if uneven:
        found.append(f"{uneven} tasks have unequal numbers of rollouts before and after")
    lacking = len(a.rollouts.keys() ^ b.rollouts.keys())
    if lacking:
        found.append(f"{lacking} tasks are in one collection only and were left out")
    if a.left_out or b.left_out:
        found.append(f"{a.left_out} rollouts before and {b.left_out} after have no valid reward and were left out")
    return tuple(found)


def _refuse_different_sampling(
    before: Sequence[Rollout | None], after: Sequence[Rollout | None], names: tuple[str, str]
) -> None:
    seen = [{r.sampling for r in side if r is not None} for side in (before, after)]
    agents = [{r.agent for r in side if r is not None} for side in (before, after)]
    for what, (x, y) in (("sampled", seen), ("collected by", agents)):
        if x and y and x != y:
            raise UserError(
                f"{names[0]} and {names[1]} were {what} differently: {_listed(x)} against {_listed(y)}",
                remedy="collect both with the same settings and agent",
            )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
