"""Paired statistics: against textbook formulas, brute force and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gymtrl.comparison.estimate import cluster_mean, sign_flip_p


def test_single_clusters_give_the_paired_t_interval() -> None:
    x = np.array([0.5, -0.25, 0.0, 1.0, 0.25, 0.75])
    estimate = cluster_mean(x, range(6))
    low, high = stats.t.interval(0.95, 5, loc=x.mean(), scale=stats.sem(x))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.degrees_of_freedom == pytest.approx(5)


def test_variance_and_degrees_of_freedom_match_matrices() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(7), [1, 2, 3, 1, 5, 2, 4])
    x = rng.normal(size=len(clusters))
    n = len(x)
    residual_maker = np.eye(n) - np.ones((n, n)) / n
    columns = []
    for c in range(7):
        members = (clusters == c).astype(float)
        block = np.eye(int(members.sum())) - 1 / n
        values, vectors = np.linalg.eigh(block)
        root = vectors @ np.diag(values**-0.5) @ vectors.T  # A_c = (I - H_cc)^(-1/2)
        weights = np.zeros(n)
        weights[clusters == c] = root.sum(axis=0) / n
        columns.append(residual_maker @ weights)
    g = np.array(columns)
    estimate = cluster_mean(x, clusters)
    assert estimate.standard_error**2 == pytest.approx(np.sum((g @ x) ** 2))
    m = g @ g.T
    assert estimate.degrees_of_freedom == pytest.approx(np.trace(m) ** 2 / np.trace(m @ m))


def test_interval_covers_under_clustering() -> None:
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(20), rng.integers(1, 8, size=20))
    covered = 0
    for _ in range(2000):
        x = rng.normal(size=20)[clusters] + rng.normal(size=len(clusters))
        estimate = cluster_mean(x, clusters)
        covered += estimate.low <= 0 <= estimate.high
    assert 0.93 < covered / 2000 < 0.97


def test_detectable_difference_is_found_four_times_in_five() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, 60))
    found = sum(cluster_mean(d + cluster_mean(d, range(60)).detectable, range(60)).low > 0 for d in x)
    assert 0.75 < found / 2000 < 0.86


def test_sign_flips_match_the_exact_test() -> None:
    # Eight positive differences of equal size: only two of 2^8 patterns are as extreme.
    assert sign_flip_p([0.5] * 8, range(8)) == pytest.approx(2 / 2**8)
    assert sign_flip_p([0.5] * 8, [0, 0, 0, 0, 1, 1, 1, 1]) == pytest.approx(2 / 2**2)
    x = np.random.default_rng(5).normal(0.3, 1, size=40)
    assert sign_flip_p(x, range(40)) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.02)
