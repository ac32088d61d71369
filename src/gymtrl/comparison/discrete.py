"""Counts of successes: exact McNemar, the interval of a share, and pass@k.

Sources: McNemar 1947 (Psychometrika 12) in its exact form, Wilson 1927 (JASA 22), Chen et al. 2021 (arXiv 2107.03374).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gymtrl.comparison.estimate import LEVEL


def mcnemar_p(fixed: int, broken: int) -> float:
    """Exact two-sided p-value that failures became successes as often as successes became failures.

    It takes one rollout of each task before and after, and independent tasks. Those that did not change say nothing.

    Args:
        fixed (`int`): Tasks that failed before and succeed after.
        broken (`int`): Tasks that succeeded before and fail after.
    """
    changed = fixed + broken
    return min(1.0, 2 * float(special.bdtr(min(fixed, broken), changed, 0.5)))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, from independent trials; all of 0 to 1 where there are none.

    For callers: `compare` tells differences, not the share of one side.
    """
    if n == 0:
        return 0.0, 1.0
    z = float(special.ndtri(0.5 + LEVEL / 2))
    share, penalty = successes / n, z * z / n
    centre = (share + penalty / 2) / (1 + penalty)
    half = z * math.sqrt(share * (1 - share) / n + penalty / (4 * n)) / (1 + penalty)
    # At the ends the limit is exactly 0 or 1, which rounding must not miss.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """The chance that at least one of k rollouts drawn without replacement succeeds, for each task.

    Args:
        n (`ArrayLike` of `int`): Rollouts of each task, at least k.
        c (`ArrayLike` of `int`): Those that succeeded.
        k (`int`): Rollouts drawn.

    Raises:
        ValueError: A task has fewer than k rollouts.
    """
    total, good = np.asarray(n, dtype=float), np.asarray(c, dtype=float)
    if k < 1 or np.any(total < k):
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} rollouts of every task")
    none = np.ones(np.broadcast_shapes(total.shape, good.shape))
    for drawn in range(k):
        none *= np.maximum(total - good - drawn, 0) / (total - drawn)
    return 1 - none
