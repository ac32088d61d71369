"""What a comparison says, as it is kept in `comparison.json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from gymtrl.comparison.estimate import MeanEstimate
from gymtrl.rollouts.record import Origin, Sampling

COMPARISON = "comparison.json"
"""The file's name."""

Outcome = Literal["improved", "regressed", "not shown"]
Reason = Literal["only_before", "only_after", "other_prompt", "no_value"]


class Side(msgspec.Struct, frozen=True):
    """One collection, and what became of its lines: counted, left out or skipped.

    Attributes:
        name (`str`): Its files.
        lines (`int`): Lines that are not blank.
        rollouts (`int`): Rollouts with a valid value of the metric; only these are compared.
        refused (`int`): Of these, those whose answer is no sound chat: the model failed, and its reward counts.
        left_out (`dict[str, int]`): Lines by the reason why they are not compared: `duplicate`, `masked`,
            `value_missing`, `value_not_finite`, or why they could not be read. None of them counts as 0.
        skipped (`int`): Lines of files that Gym writes beside the rollouts.
        failed_attempts (`dict[str, int]`): Attempts that the world failed, by class, as Gym lists them beside the file.
        missing (`int`, *optional*): Rollouts that were asked for and stand in no line that can be read; `None` where
            nothing tells what was asked for.
        refused_by (`dict[str, int]`): Those `refused`, by the reason why their answer is no sound chat.
        sampling (`dict[str, tuple[Sampling, ...]]`): How the policy was asked to sample, by environment.
        unread (`int`): Of the lines left out, those that could not be read.
    """

    name: str
    lines: int
    rollouts: int
    refused: int
    left_out: dict[str, int]
    skipped: int
    failed_attempts: dict[str, int]
    missing: int | None
    refused_by: dict[str, int] = {}
    sampling: dict[str, tuple[Sampling, ...]] = {}
    unread: int = 0


class PassAtK(msgspec.Struct, frozen=True):
    """The chance that one of k rollouts passes, over the tasks with at least k rollouts on both sides.

    Attributes:
        k (`int`): Rollouts.
        tasks (`int`): Tasks.
        before, after (`float`): pass@k.
        difference (`MeanEstimate`, *optional*): Of pass@k; `None` where these tasks are in one cluster.
        one_before, one_after (`float`): pass@1 of the same tasks.
    """

    k: int
    tasks: int
    before: float
    after: float
    difference: MeanEstimate | None
    one_before: float
    one_after: float


class Effect(msgspec.Struct, frozen=True):
    """The difference in one environment, or in all.

    Attributes:
        environment (`str`): The agent's name; `""` for all.
        outcome (`str`): `improved` or `regressed` where `p_adjusted` is at most 0.05, else `not shown`.
        before, after (`MeanEstimate`): Mean of the tasks' means.
        difference (`MeanEstimate`): Mean over tasks of after minus before, in units of the metric.
        p (`float`): Two-sided p-value that the difference is no larger than the smallest that counts: by the t test of
            the interval; below 15 clusters, or where all tasks changed alike, no smaller than by sign flips.
        p_adjusted (`float`): The same after Holm's adjustment: for all tasks over the candidates, for one of several
            environments over the environments of all candidates.
        bootstrap (`tuple[float, float]`): The interval of the difference by bootstrap over clusters.
        sign_flip_p (`float`): p-value under flips of the sign of whole clusters.
        mcnemar_p (`float`, *optional*): Exact, where values are binary, each task was tried once and tasks are
            independent.
        better, worse, equal (`int`): Tasks by the sign of their difference.
        fixed, broken (`int`): Tasks most of whose rollouts pass after and did not before, and the other way round.
        pass_threshold (`float`, *optional*): Value at which a rollout passes; `None` where environments differ in it.
        repeats (`tuple[int, int]`): Fewest and most rollouts of a task.
        pass_at (`tuple[PassAtK, ...]`): For some k, from 1.
    """

    environment: str
    outcome: Outcome
    before: MeanEstimate
    after: MeanEstimate
    difference: MeanEstimate
    p: float
    p_adjusted: float
    bootstrap: tuple[float, float]
    sign_flip_p: float
    mcnemar_p: float | None
    better: int
    worse: int
    equal: int
    fixed: int
    broken: int
    pass_threshold: float | None
    repeats: tuple[int, int]
    pass_at: tuple[PassAtK, ...]


class Cost(msgspec.Struct, frozen=True):
    """What rollouts took, or how many of them went in some way, as the mean over tasks of their rollouts' means.

    Attributes:
        name (`str`): What is counted.
        before, after (`float`): Means.
        difference (`MeanEstimate`): Of the tasks' means.
        tasks (`int`): Tasks in which it is known on both sides.
        examples (`tuple[str, ...]`): Of ways to go, some rollouts after, as `file:line`; of a form that was lost, some
            without it.
    """

    name: str
    before: float
    after: float
    difference: MeanEstimate
    tasks: int
    examples: tuple[str, ...] = ()


class Habits(msgspec.Struct, frozen=True):
    """How the policy went about the tasks of one environment.

    Attributes:
        environment (`str`): The agent's name.
        measures (`tuple[Cost, ...]`): Those of `measures.MEASURES` of which there is something.
    """

    environment: str
    measures: tuple[Cost, ...]


class Unpaired(msgspec.Struct, frozen=True):
    """Tasks that are left out because they have no partner.

    Attributes:
        reason (`str`): `only_before`, `only_after`, `other_prompt` (the same question was asked with another system
            prompt, other tools or another history, or stands in another input row), or `no_value` (no valid value on
            one side).
        tasks (`int`): How many.
        detail (`str`): What differs, or on which side, in words.
        examples (`tuple[str, ...]`): Lines of some of them, as `file:line`.
    """

    reason: Reason
    tasks: int
    detail: str
    examples: tuple[str, ...]


class TaskDifference(msgspec.Struct, frozen=True):
    """One task, before and after.

    Attributes:
        key (`str`): The key that links the task's rollouts.
        cluster (`str`): Its cluster.
        environment (`str`): The agent's name.
        question (`str`): The beginning of the last user message, for a person.
        before, after (`float`): Means over its rollouts.
        n_before, n_after (`int`): Rollouts.
    """

    key: str
    cluster: str
    environment: str
    question: str
    before: float
    after: float
    n_before: int
    n_after: int


class Flip(msgspec.Struct, frozen=True):
    """A task that was fixed or broken, and where its rollouts stand.

    Attributes:
        environment (`str`): The agent's name.
        key (`str`): Key of the task.
        kind (`str`): `fixed` or `broken`.
        before, after (`tuple[Origin, ...]`): Its rollouts, those that show it first.
    """

    environment: str
    key: str
    kind: Literal["fixed", "broken"]
    before: tuple[Origin, ...]
    after: tuple[Origin, ...]


class SharedBin(msgspec.Struct, frozen=True):
    """Rollouts of both sides with values from `low` to `high`; equal bounds where there are few distinct values.

    Attributes:
        low, high (`float`): Bounds.
        before, after (`int`): Rollouts.
    """

    low: float
    high: float
    before: int
    after: int


class Distribution(msgspec.Struct, frozen=True):
    """How the compared rollouts are distributed before and after.

    Attributes:
        name (`str`): What is counted, as in `Cost`; `""` for the metric.
        bins (`tuple[SharedBin, ...]`): In the order of their values.
    """

    name: str
    bins: tuple[SharedBin, ...]


class Candidate(msgspec.Struct, frozen=True):
    """One collection after, against the one before.

    Attributes:
        outcome (`str`): That of all environments together.
        verdict (`str`): The result in one sentence.
        after (`Side`): The collection.
        overall (`Effect`): All paired tasks.
        environments (`tuple[Effect, ...]`): Each environment with two clusters or more.
        costs (`tuple[Cost, ...]`): What the compared rollouts took, before and after.
        unpaired (`tuple[Unpaired, ...]`): Tasks that are left out.
        warnings (`tuple[str, ...]`): What makes the result less certain than the interval says.
        tasks (`tuple[TaskDifference, ...]`): Every task, by difference.
        flips (`tuple[Flip, ...]`): Tasks fixed and broken.
        habits (`tuple[Habits, ...]`): Of each environment with two clusters or more.
        distributions (`tuple[Distribution, ...]`): The compared rollouts by the metric and by what they took.
    """

    outcome: Outcome
    verdict: str
    after: Side
    overall: Effect
    environments: tuple[Effect, ...]
    costs: tuple[Cost, ...]
    unpaired: tuple[Unpaired, ...]
    warnings: tuple[str, ...]
    tasks: tuple[TaskDifference, ...]
    flips: tuple[Flip, ...]
    habits: tuple[Habits, ...] = ()
    distributions: tuple[Distribution, ...] = ()


class Comparison(msgspec.Struct, frozen=True):
    """One collection before, against one or several after.

    Attributes:
        outcome (`str`): The least favourable of the candidates' outcomes.
        verdict (`str`): A sentence for each candidate, one a line.
        metric (`str`): What was compared.
        min_effect (`float`): The smallest difference that counts.
        points (`bool`): All values lie within 0 and 1, so that differences are told in hundredths, as points.
        before (`Side`): The collection before.
        candidates (`tuple[Candidate, ...]`): Those after.
    """

    outcome: Outcome
    verdict: str
    metric: str
    min_effect: float
    points: bool
    before: Side
    candidates: tuple[Candidate, ...]
