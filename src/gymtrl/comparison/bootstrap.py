"""The mean of clustered values with a bootstrap interval over clusters.

Whole clusters are drawn with replacement. Percentiles of so few draws' means would be too narrow where clusters are
few, so they are taken further out, as a t interval is wider than a normal one (the expanded percentile interval:
Hesterberg 2015, The American Statistician 69).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from gymtrl.comparison.estimate import LEVEL, cluster_sums

_BLOCK = 1 << 21  # numbers held at a time


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the mean, from means of clusters drawn with replacement.

    Args:
        values (`ArrayLike` of `float`, shape (n,)): The values, finite.
        clusters (`ArrayLike`, shape (n,)): The cluster of each value.
        draws (`int`, defaults to 10,000): Samples drawn.
        seed (`int`, defaults to 0): Of the draws; the same seed gives the same interval.

    Raises:
        ValueError: Fewer than two clusters.
    """
    sums, sizes = cluster_sums(np.asarray(values, dtype=float)[None], clusters)
    ((low, high),) = bootstrap_intervals(sums, sizes, draws=draws, seed=seed)
    return float(low), float(high)


def bootstrap_intervals(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], *, draws: int = 10_000, seed: int = 0
) -> NDArray[np.float64]:
    """Intervals of many samples with clusters of the same sizes; see `bootstrap_interval`.

    Args:
        sums (`ndarray` of shape (samples, clusters)): The sum of each cluster's values.
        sizes (`ndarray` of shape (clusters,)): The number of each cluster's values.

    Returns:
        `ndarray` of shape (samples, 2): The limits.
    """
    m = len(sizes)
    if m < 2:
        raise ValueError("an interval needs at least two clusters")
    random = np.random.default_rng(seed)
    means = np.empty((draws, len(sums)))
    block = max(1, _BLOCK // m)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = random.integers(m, size=(rows, m)) + np.arange(rows)[:, None] * m
        times = np.bincount(drawn.ravel(), minlength=rows * m).reshape(rows, m).astype(float)
        means[start : start + rows] = (times @ sums.T) / (times @ sizes)[:, None]
    outside = float(special.ndtr(math.sqrt(m / (m - 1)) * special.stdtrit(m - 1, 0.5 - LEVEL / 2)))
    limits: NDArray[np.float64] = np.quantile(means, (outside, 1 - outside), axis=0).T
    return limits
