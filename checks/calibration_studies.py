"""Studies that are drawn, not collected: rewards of the same tasks before and after, whose true effect is known.

A task's true score is what it shares with its cluster and something of its own; its rewards scatter around it from
rollout to rollout. Training changes some tasks for the better and some for the worse:

- `even`: the cluster's part is drawn anew, and so is that of every fifth task. What was lost can as well be won.
- `skewed`: three of four clusters gain 0.1 and the fourth loses 0.3; each task gains or loses another 0.05.

Over all tasks that there could be both come to nothing. A true effect is added by solving a share of what would fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.floating]
_NUMBERS = 4_000_000  # rewards held at a time, of one side


@dataclass(frozen=True)
class Cell:
    """Studies of one kind.

    Attributes:
        tasks, repeats (`int`): Tasks, and rollouts of each on each side.
        rewards (`str`): `binary`, or `fractional` within 0 and 1.
        effects (`str`): `even` or `skewed`; see above.
        clusters (`int`, *optional*): Clusters; every task is its own where there are none.
        sizes (`str`): Of clusters: `equal`, or `unequal` with the largest about twenty times the smallest.
    """

    tasks: int
    repeats: int
    rewards: Literal["binary", "fractional"]
    effects: Literal["even", "skewed"]
    clusters: int | None = None
    sizes: Literal["equal", "unequal"] = "equal"

    @cached_property
    def codes(self) -> NDArray[np.intp]:
        """The cluster of each task."""
        if self.clusters is None:
            return np.arange(self.tasks)
        weights = np.exp(np.linspace(0, 3 if self.sizes == "unequal" else 0, self.clusters))
        ends = np.round(np.cumsum(weights) / weights.sum() * self.tasks).astype(int)
        return np.searchsorted(ends, np.arange(self.tasks), side="right")

    @property
    def mean_after(self) -> float:
        """The mean true score after training that has no effect on the whole."""
        return 0.5 if self.effects == "even" else 0.6


def studies(cell: Cell, count: int, seed: tuple[int, ...], *, effect: float = 0.0) -> Iterator[tuple[Floats, Floats]]:
    """Draws studies.

    Args:
        cell (`Cell`): Their kind.
        count (`int`): How many.
        seed (`tuple[int, ...]`): The same one draws the same studies.
        effect (`float`, defaults to 0): The true mean difference over all tasks that there could be.

    Yields:
        `tuple[ndarray, ndarray]`: Rewards before and after, of shape (studies, tasks, repeats).
    """
    random = np.random.default_rng(seed)
    block = max(1, _NUMBERS // (cell.tasks * cell.repeats))
    for start in range(0, count, block):
        before, after = _scores(cell, min(block, count - start), random)
        after += effect / (1 - cell.mean_after) * (1 - after)
        yield _rewards(cell, before, random), _rewards(cell, after, random)


def _scores(cell: Cell, count: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """True scores of tasks before and after, of shape (studies, tasks)."""
    own, shared = (count, cell.tasks), (count, int(cell.codes[-1]) + 1)
    if cell.effects == "even":
        task, other = random.uniform(-0.3, 0.3, size=(2, *own))
        first, second = random.uniform(-0.15, 0.15, size=(2, *shared))
        later = np.where(random.random(own) < 0.8, task, other)
        return 0.5 + first[:, cell.codes] + task, 0.5 + second[:, cell.codes] + later
    before = random.uniform(0.45, 0.75, size=own)
    change = np.where(random.random(shared) < 0.75, 0.1, -0.3)[:, cell.codes]
    return before, before + change + np.where(random.random(own) < 0.5, 0.05, -0.05)


def _rewards(cell: Cell, scores: Floats, random: np.random.Generator) -> Floats:
    """Rewards with these means, of shape (studies, tasks, repeats)."""
    drawn = random.random((*scores.shape, cell.repeats), dtype=np.float32)
    means = scores[..., None].astype(np.float32)
    if cell.rewards == "binary":
        return (drawn < means).astype(np.float32)
    # Beta with the parameters p / (1 - p) and 1, whose mean is p.
    return drawn ** ((1 - means) / means)


def half_widths(before: Floats, after: Floats) -> dict[str, Floats]:
    """Half the 95 % interval of what others do, for each study; a difference beyond it would be announced.

    Args:
        before, after (`ndarray`): Rewards, of shape (studies, tasks, repeats).

    Returns:
        `dict[str, ndarray]`: `unpaired z`: the means of tasks as two samples. `welch over repeats`: the mean of each
        repeat over all tasks as one value (two repeats or more). `rollout level`: every rollout as a value of its own.
    """
    z = float(stats.norm.ppf(0.975))
    found = {
        "unpaired z": z * _unpaired_error(before.mean(axis=2, dtype=float), after.mean(axis=2, dtype=float)),
        "rollout level": z * _unpaired_error(*(side.reshape(len(side), -1) for side in (before, after))),
    }
    if (repeats := before.shape[2]) > 1:
        parts = [side.mean(axis=1, dtype=float).var(axis=1, ddof=1) / repeats for side in (before, after)]
        # Where all repeats come to the same mean the interval has no width, whatever t is.
        squares = np.maximum(parts[0] ** 2 + parts[1] ** 2, 1e-30)
        df = np.maximum((parts[0] + parts[1]) ** 2 * (repeats - 1) / squares, 1)
        found["welch over repeats"] = stats.t.ppf(0.975, df) * np.sqrt(parts[0] + parts[1])
    return found


def _unpaired_error(before: Floats, after: Floats) -> Floats:
    n = before.shape[1]
    error: Floats = np.sqrt(sum(side.var(axis=1, ddof=1, dtype=float) for side in (before, after)) / n)
    return error


def plain_cluster_half_width(sums: Floats, sizes: Floats) -> Floats:
    """Half the interval of the sandwich with C / (C - 1) and t on C - 1, for each study.

    Args:
        sums (`ndarray` of shape (studies, clusters)): The sum of each cluster's differences.
        sizes (`ndarray` of shape (clusters,)): Its tasks.
    """
    n, m = sizes.sum(), len(sizes)
    residuals = sums - sums.sum(axis=1, keepdims=True) / n * sizes
    half: Floats = stats.t.ppf(0.975, m - 1) * np.sqrt(m / (m - 1) * (residuals**2).sum(axis=1)) / n
    return half
