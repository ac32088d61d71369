"""Formulae of the comparison: against other implementations, brute force and numbers in print."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from gymtrl.comparison.bootstrap import bootstrap_interval, bootstrap_intervals
from gymtrl.comparison.discrete import mcnemar_p, pass_at_k, wilson_interval
from gymtrl.comparison.estimate import cluster_mean, sign_flip_p, sign_flip_ps
from gymtrl.comparison.multiple import holm

DESIGNS = ([1] * 6, [3] * 8, [1, 2, 3, 1, 5, 2, 4], [40, 1, 1, 1, 1, 1], [2, 17, 9, 30, 1, 4, 4, 12, 25])


def clustered(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values, and their clusters in mixed order."""
    random = np.random.default_rng(sum(sizes))
    clusters = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return random.normal(size=len(sizes))[clusters] + random.normal(size=len(clusters)), clusters


@pytest.mark.parametrize("sizes", DESIGNS, ids=str)
def test_cr2_and_its_degrees_of_freedom_match_matrices(sizes: list[int]) -> None:
    """The definition for any regression (Pustejovsky & Tipton 2018), here with an intercept alone."""
    y, clusters = clustered(sizes)
    n = len(y)
    design = np.ones((n, 1))
    bread = np.linalg.inv(design.T @ design)
    residual_maker = np.eye(n) - design @ bread @ design.T
    residuals = residual_maker @ y
    meat, combinations = 0.0, []
    for c in range(len(sizes)):
        own = np.flatnonzero(clusters == c)
        values, vectors = np.linalg.eigh(residual_maker[np.ix_(own, own)])
        adjust = vectors @ np.diag(values**-0.5) @ vectors.T
        meat += ((design[own].T @ adjust @ residuals[own]).item()) ** 2
        combinations.append(residual_maker[:, own] @ adjust @ design[own] @ bread)
    g = np.hstack(combinations)
    product = g.T @ g  # the variance is a quadratic form; its eigenvalues give Satterthwaite's approximation
    eigenvalues = np.linalg.eigvalsh(product)
    found = cluster_mean(y, clusters)
    error = math.sqrt(bread.item() ** 2 * meat)
    df = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert found.standard_error == pytest.approx(error, rel=1e-9)
    assert found.degrees_of_freedom == pytest.approx(df, rel=1e-9)
    t = stats.t.ppf(0.975, df)
    assert (found.low, found.high) == pytest.approx((y.mean() - t * error, y.mean() + t * error), rel=1e-9)


def test_single_tasks_give_the_paired_t_test() -> None:
    before, after = np.random.default_rng(2).random((2, 40))
    interval = stats.ttest_rel(after, before).confidence_interval()
    found = cluster_mean(after - before, range(40))
    assert (found.low, found.high) == pytest.approx(interval, rel=1e-9)


@pytest.mark.parametrize("sizes", DESIGNS, ids=str)
def test_sign_flips_match_the_permutation_test(sizes: list[int]) -> None:
    y, clusters = clustered(sizes)
    sums = [y[clusters == c].sum() for c in range(len(sizes))]
    expected = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(y, clusters) == pytest.approx(expected.pvalue, rel=1e-9)


def test_many_sign_flips_are_drawn() -> None:
    x = np.random.default_rng(5).normal(0.3, 1, size=60)
    assert sign_flip_p(x, range(60)) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.01)


def test_one_sample_is_tested_as_many_are() -> None:
    sums, sizes = np.random.default_rng(6).normal(size=(700, 61)), np.ones(61)
    flips, limits = sign_flip_ps(sums), bootstrap_intervals(sums, sizes, draws=2000)
    for i in (0, 699):
        assert sign_flip_p(sums[i], range(61)) == flips[i]
        assert bootstrap_interval(sums[i], range(61), draws=2000) == pytest.approx(limits[i], rel=1e-9)


def test_ties_count_as_extreme_whatever_their_scale() -> None:
    tenths = [0.1, 0.2, 0.3, -0.1, 0.3, 0.1]
    expected = stats.permutation_test(([1, 2, 3, -1, 3, 1],), np.sum, permutation_type="samples", n_resamples=np.inf)
    for scale in (1e-6, 1, 1e9):
        assert sign_flip_p([scale * x for x in tenths], range(6)) == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (1, 0), (5, 5), (41, 17), (0, 9), (300, 350)])
def test_mcnemar_matches_statsmodels(fixed: int, broken: int) -> None:
    assert mcnemar_p(fixed, broken) == pytest.approx(mcnemar([[7, broken], [fixed, 3]], exact=True).pvalue, rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 20), (1, 29), (15, 148), (81, 263), (20, 20)])
def test_wilson_matches_statsmodels(successes: int, n: int) -> None:
    expected = proportion_confint(successes, n, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_wilson_matches_the_intervals_in_print() -> None:
    """Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    printed = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), limits in printed.items():
        assert wilson_interval(successes, n) == pytest.approx(limits, abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("p", [[], [0.03], [0.01, 0.04, 0.03, 0.005], [0.2, 0.9, 0.01, 0.01, 0.6]], ids=str)
def test_holm_matches_statsmodels(p: list[float]) -> None:
    expected = multipletests(p, method="holm")[1].tolist() if p else []
    assert holm(p) == pytest.approx(expected, rel=1e-9)


def test_pass_at_k_counts_the_draws() -> None:
    n, c = np.meshgrid(range(4, 9), range(5))
    for k in (1, 2, 4):
        expected = [1 - Fraction(math.comb(a - b, k), math.comb(a, k)) for a, b in zip(n.flat, c.flat, strict=True)]
        assert pass_at_k(n, c, k).ravel() == pytest.approx([float(x) for x in expected], abs=1e-12)
    assert pass_at_k([8, 2], [2, 1], 1).tolist() == [0.25, 0.5]
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-9)
    with pytest.raises(ValueError, match="pass@4"):
        pass_at_k([8, 3], [1, 1], 4)


def test_the_bootstrap_matches_all_the_samples_there_are() -> None:
    y, clusters = np.array([0.0, 1.0, 5.0, 2.0, 7.0, 3.0]), np.array([0, 0, 1, 2, 2, 2])
    parts = [y[clusters == c] for c in range(3)]
    means = [np.concatenate(drawn).mean() for drawn in itertools.product(parts, repeat=3)]
    outside = stats.norm.cdf(math.sqrt(3 / 2) * stats.t.ppf(0.025, 2))
    low, high = np.quantile(means, (outside, 1 - outside), method="inverted_cdf")
    assert bootstrap_interval(y, clusters, draws=100_000) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("sizes", [[1] * 300, [1, 2, 3, 6] * 50], ids=["single", "clusters"])
def test_the_bootstrap_agrees_with_the_interval_of_many_clusters(sizes: list[int]) -> None:
    y, clusters = clustered(sizes)
    found, expected = bootstrap_interval(y, clusters), cluster_mean(y, clusters)
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))
    assert found == bootstrap_interval(y, clusters)
    assert found != bootstrap_interval(y, clusters, seed=1)
    assert bootstrap_interval(y + 10, clusters) == pytest.approx((found[0] + 10, found[1] + 10), rel=1e-9)


def test_one_cluster_has_no_interval() -> None:
    for interval in (bootstrap_interval, cluster_mean):
        with pytest.raises(ValueError, match="two clusters"):
            interval([1.0, 2.0], [0, 0])
