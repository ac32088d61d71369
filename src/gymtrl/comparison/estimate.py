"""The mean of paired differences with a cluster-robust interval.

Tasks of one cluster (twins, one template, one repository) are not independent, so the variance is summed by cluster.
With few or unequal clusters the plain sandwich is too small; the CR2 correction and Bell-McCaffrey degrees of freedom
mend that. Sources: Bell & McCaffrey 2002 (Survey Methodology 28), Pustejovsky & Tipton 2018 (JBES 36), Miller 2024
(arXiv 2411.00640).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LEVEL = 0.95
_EXACT_CLUSTERS = 14  # 2^14 sign patterns are all tried; with more clusters, a sample of them
_SAMPLED_SIGNS = 20_000
_FEW_SAMPLES = 4  # for them, looking sums up is faster than making every sign
_BLOCK = 1 << 18  # numbers held at a time
POWER = 0.8
ROUNDING = 1e-9
"""Of a mean: what is smaller may be rounding alone."""


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

    @property
    def alike(self) -> bool:
        """Whether the values are all the same, but for rounding."""
        return self.standard_error <= ROUNDING * abs(self.mean)


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
    sums, sizes = cluster_sums(np.asarray(values, dtype=float)[None], clusters)
    means, errors, df = means_and_errors(sums, sizes)
    mean, error = float(means[0]), float(errors[0])
    t = float(special.stdtrit(df, 0.5 + LEVEL / 2))
    detectable = (t + float(special.stdtrit(df, POWER))) * error
    return MeanEstimate(mean, error, df, mean - t * error, mean + t * error, detectable, int(sizes.sum()), len(sizes))


def cluster_sums(values: NDArray[np.float64], clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums values by cluster.

    Args:
        values (`ndarray` of shape (samples, n)): Samples of the same tasks.
        clusters (`ArrayLike`, shape (n,)): The cluster of each task.

    Returns:
        `tuple[ndarray, ndarray]`: Sums, of shape (samples, clusters), and the number of values in each cluster.
    """
    _, codes, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    first = np.cumsum(sizes) - sizes
    sums = np.add.reduceat(values[:, np.argsort(codes, kind="stable")], first, axis=1)
    return sums, sizes.astype(float)


def means_and_errors(
    sums: NDArray[np.float64], sizes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Means of many samples with clusters of the same sizes, their CR2 standard errors, and the degrees of freedom.

    Args:
        sums (`ndarray` of shape (samples, clusters)): The sum of each cluster's values.
        sizes (`ndarray` of shape (clusters,)): The number of each cluster's values.

    Raises:
        ValueError: Fewer than two clusters.
    """
    n = float(sizes.sum())
    if len(sizes) < 2:
        raise ValueError("an interval needs at least two clusters")
    means = sums.sum(axis=1) / n
    residuals = sums - means[:, None] * sizes
    a2 = 1.0 / (1.0 - sizes / n)
    variances = (residuals**2 @ a2) / n**2
    diagonal = a2 * (sizes - sizes**2 / n) / n**2
    weights = a2 * sizes**2
    off_diagonal = (weights.sum() ** 2 - np.sum(weights**2)) / n**6
    df = float(diagonal.sum() ** 2 / (np.sum(diagonal**2) + off_diagonal))
    return means, np.sqrt(variances), df


def sign_flip_p(values: ArrayLike, clusters: ArrayLike) -> float:
    """Two-sided p-value of the mean under flips of the sign of whole clusters.

    It assumes nothing but symmetry under the null hypothesis, so it holds for few clusters, where an interval does not.
    All sign patterns are tried for up to 14 clusters, else 20,000 drawn with a fixed seed.

    Args:
        values (`ArrayLike` of `float`, shape (n,)): Paired differences.
        clusters (`ArrayLike`, shape (n,)): The cluster of each.
    """
    sums, _ = cluster_sums(np.asarray(values, dtype=float)[None], clusters)
    return float(sign_flip_ps(sums)[0])


def sign_flip_ps(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """P-values of many samples; see `sign_flip_p`.

    Args:
        sums (`ndarray` of shape (samples, clusters)): The sum of each cluster's values.
    """
    m = sums.shape[1]
    least = np.abs(sums.sum(axis=1)) - 1e-12 * np.abs(sums).sum(axis=1)  # ties count, whatever rounding makes of them
    if m <= _EXACT_CLUSTERS:
        signs = np.where(np.arange(2**m)[:, None] >> np.arange(m) & 1 == 1, -1.0, 1.0)
        shares: NDArray[np.float64] = (np.abs(signs @ sums.T) >= least).mean(axis=0)
        return shares
    random = np.random.default_rng(0)
    as_extreme = np.ones(len(sums))  # the observed pattern counts as one of the draws
    tables = [_sums_of_eight(one) for one in sums] if len(sums) <= _FEW_SAMPLES else []
    block = max(1, _BLOCK // (m + len(sums)))
    for start in range(0, _SAMPLED_SIGNS, block):
        # Whole words, so that the patterns do not depend on how many are made at a time.
        shape = (min(block, _SAMPLED_SIGNS - start), (m + 63) // 64)
        drawn = random.integers(1 << 64, size=shape, dtype=np.uint64).view(np.uint8)
        if tables:
            places = drawn[:, : (m + 7) // 8] + 256 * np.arange((m + 7) // 8)
            flipped = np.stack([table[places].sum(axis=1) for table in tables], axis=1)
        else:
            flipped = np.where(np.unpackbits(drawn, axis=1)[:, :m] == 1, -1.0, 1.0) @ sums.T
        as_extreme += np.count_nonzero(np.abs(flipped) >= least, axis=0)
    return as_extreme / (_SAMPLED_SIGNS + 1)


def _sums_of_eight(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums of each eight clusters under all patterns of their signs: what a drawn byte stands for."""
    padded = np.zeros((len(sums) + 7) // 8 * 8)
    padded[: len(sums)] = sums
    signs = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1), -1.0, 1.0)
    table: NDArray[np.float64] = (padded.reshape(-1, 8) @ signs.T).ravel()
    return table
