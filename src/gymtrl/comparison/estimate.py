"""The mean of paired differences with a cluster-robust interval.

Tasks of one cluster (twins, one template, one repository) are not independent, so the variance is summed by cluster.
With few or unequal clusters the plain sandwich is too small; the CR2 correction and Bell-McCaffrey degrees of freedom
mend that. Sources: Bell & McCaffrey 2002 (Survey Methodology 28), Pustejovsky & Tipton 2018 (JBES 36), Miller 2024
(arXiv 2411.00640).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95
_EXACT_CLUSTERS = 14  # 2^14 sign patterns are all tried; with more clusters, a sample of them
_SAMPLED_SIGNS = 20_000
POWER = 0.8


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its uncertainty.

    Attributes:
        mean (`float`): The mean, in units of the values.
        standard_error (`float`): Its CR2 standard error.
        degrees_of_freedom (`float`): Bell-McCaffrey; tasks minus one where every task is its own cluster.
        low, high (`float`): The 95 % interval.
        detectable (`float`): Smallest true difference that a sample like this shows with 80 % power at 5 %.
        n (`int`): Values.
        clusters (`int`): Clusters.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    detectable: float
    n: int
    clusters: int


def cluster_mean(values: ArrayLike, clusters: ArrayLike) -> MeanEstimate:
    """Estimates the mean of clustered values.

    With e the residuals, n values and n_c in cluster c: V = sum_c (sum_{i in c} e_i)^2 / (1 - n_c/n) / n^2. The degrees
    of freedom are (tr M)^2 / tr(M^2), where M_cd = a_c a_d (n_c [c = d] - n_c n_d / n) / n^2 and
    a_c = (1 - n_c/n)^(-1/2), which is Satterthwaite's approximation under independent errors.

    Args:
        values (`ArrayLike` of `float`, shape (n,)): The values, finite.
        clusters (`ArrayLike`, shape (n,)): The cluster of each value.

    Raises:
        ValueError: Fewer than two clusters.
    """
    x = np.asarray(values, dtype=float)
    codes: NDArray[np.intp]
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(codes).astype(float)
    n, m = len(x), len(sizes)
    if m < 2:
        raise ValueError("an interval needs at least two clusters")
    mean = float(x.mean())
    sums = np.bincount(codes, weights=x - mean)
    a2 = 1.0 / (1.0 - sizes / n)
    variance = float(np.sum(sums**2 * a2)) / n**2
    diagonal = a2 * (sizes - sizes**2 / n) / n**2
    weights = a2 * sizes**2
    off_diagonal = (weights.sum() ** 2 - np.sum(weights**2)) / n**6
    df = float(diagonal.sum() ** 2 / (np.sum(diagonal**2) + off_diagonal))
    error = float(np.sqrt(variance))
    t = float(stats.t.ppf(0.5 + LEVEL / 2, df))
    detectable = (t + float(stats.t.ppf(POWER, df))) * error
    return MeanEstimate(mean, error, df, mean - t * error, mean + t * error, detectable, n, m)


def sign_flip_p(values: ArrayLike, clusters: ArrayLike) -> float:
    """Two-sided p-value of the mean under flips of the sign of whole clusters.

    It assumes nothing but symmetry under the null hypothesis, so it holds for few clusters, where an interval does not.
    All sign patterns are tried for up to 14 clusters, else 20,000 drawn with a fixed seed.

    Args:
        values (`ArrayLike` of `float`, shape (n,)): Paired differences.
        clusters (`ArrayLike`, shape (n,)): The cluster of each.
    """
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(codes, weights=np.asarray(values, dtype=float))
    if len(sums) <= _EXACT_CLUSTERS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(sums))))
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(_SAMPLED_SIGNS, len(sums)))
        extra = 1  # the observed pattern counts as one of the draws
    as_extreme = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12
    return float((as_extreme.sum() + extra) / (len(signs) + extra))
