"""How many tasks and repeats show a difference of a given size.

A task's difference of means scatters by what training does to one task more than to another (omega^2), and by chance
from rollout to rollout (sigma^2 of each side over the number of repeats). Over n tasks the mean's variance is
(omega^2 + sigma_A^2 / K_A + sigma_B^2 / K_B) / n (Miller 2024, arXiv 2411.00640). More tasks lower all of it, more
repeats the second part only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gymtrl.comparison.estimate import LEVEL, POWER, cluster_mean


class Variance(msgspec.Struct, frozen=True):
    """What makes the differences of tasks scatter.

    Attributes:
        between (`float`): Variance of the true differences of tasks. Where tasks come in clusters it is larger by what
            the tasks of one have in common, for further tasks in clusters of the same kind.
        within (`float`): Variance from rollout to rollout of one task, before and after added up.
        freedom (`float`): Degrees of freedom that a task adds: 1, and fewer in clusters.
    """

    between: float
    within: float
    freedom: float = 1.0

    def of_task(self, repeats: float) -> float:
        """Variance of one task's difference with so many rollouts on each side."""
        return self.between + self.within / repeats


class TaskScores(msgspec.Struct, frozen=True):
    """The rewards of one task's rollouts.

    Attributes:
        cluster (`str`): The task's cluster.
        rewards (`list[float]`): At least one.
    """

    cluster: str
    rewards: list[float]


def variance_between_tasks(values: Sequence[float], clusters: Sequence[str], noise: float) -> tuple[float, float]:
    """Splits off what tasks differ by.

    Args:
        values (`Sequence[float]`): A mean, or a difference of means, of each task.
        clusters (`Sequence[str]`): The cluster of each.
        noise (`float`): The part of their variance that comes from rollout to rollout.

    Returns:
        `tuple[float, float]`: The variance that is left, not below 0, and the degrees of freedom that a task adds.

    Raises:
        ValueError: Fewer than two clusters.
    """
    mean = cluster_mean(values, clusters)
    return max(mean.n * mean.standard_error**2 - noise, 0.0), (mean.degrees_of_freedom + 1) / mean.n


def variance_within_tasks(tasks: Sequence[TaskScores]) -> float | None:
    """Mean variance from rollout to rollout of a task; `None` where no task has two."""
    found = [float(np.var(task.rewards, ddof=1)) for task in tasks if len(task.rewards) > 1]
    return float(np.mean(found)) if found else None


def noise_of_means(tasks: Sequence[TaskScores], within: float) -> float:
    """The part of the variance of tasks' means that comes from rollout to rollout.

    Args:
        tasks (`Sequence[TaskScores]`): The tasks.
        within (`float`): Taken for those with one rollout.
    """
    shares = [
        (float(np.var(task.rewards, ddof=1)) if len(task.rewards) > 1 else within) / len(task.rewards) for task in tasks
    ]
    return float(np.mean(shares))


def detectable(variance: Variance, tasks: int, repeats: float) -> float:
    """The smallest true difference that four of five such studies show at 5 %, as `cluster_mean` reckons it."""
    freedom = variance.freedom * tasks - 1
    if freedom <= 0:
        return math.inf
    return _quantiles(freedom) * math.sqrt(variance.of_task(repeats) / tasks)


def tasks_needed(variance: Variance, effect: float, repeats: int) -> int:
    """The fewest tasks that show a difference four times in five.

    Args:
        variance (`Variance`): What makes differences scatter.
        effect (`float`): The true difference, above 0.
        repeats (`int`): Rollouts of each task on each side.
    """
    # The formula takes the normal distribution; t asks for a few more.
    fewest = max(2, math.ceil(normal_tasks(variance, effect, repeats)))
    enough = fewest
    while detectable(variance, enough, repeats) > effect:
        enough *= 2
    while fewest < enough:
        middle = (fewest + enough) // 2
        if detectable(variance, middle, repeats) > effect:
            fewest = middle + 1
        else:
            enough = middle
    return enough


def normal_tasks(variance: Variance, effect: float, repeats: int) -> float:
    """The published formula, for many tasks: (z_0.975 + z_0.8)^2 times the variance of a task over effect squared."""
    ratio = _quantiles(math.inf) / effect
    return ratio * ratio * variance.of_task(repeats)


def repeats_needed(variance: Variance, effect: float, tasks: int) -> int | None:
    """The fewest repeats with which so many tasks show a difference; `None` where no number of them is enough."""
    freedom = variance.freedom * tasks - 1
    if freedom <= 0:
        return None
    left = tasks * (effect / _quantiles(freedom)) ** 2 - variance.between
    return max(1, math.ceil(variance.within / left)) if left > 0 else None


def _quantiles(freedom: float) -> float:
    t: NDArray[np.float64] = stats.t.ppf((0.5 + LEVEL / 2, POWER), freedom)
    return float(t.sum())
