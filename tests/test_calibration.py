"""The studies that `make calibration` draws are what it says, and a wrong interval would be seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from calibration import OURS, measure
from calibration_studies import Cell, half_widths, plain_cluster_half_width, studies
from scipy import stats

CELLS = [
    Cell(50, 2, rewards, effects, clusters, sizes)
    for rewards, effects, (clusters, sizes) in itertools.product(
        ("binary", "fractional"), ("even", "skewed"), ((None, "equal"), (10, "unequal"))
    )
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_studies_have_the_effect_that_they_claim(cell: Cell) -> None:
    for effect in (0.0, 0.1):
        ((before, after),) = studies(cell, 4000, (1,), effect=effect)
        assert before.shape == after.shape == (4000, 50, 2)
        assert before.min() >= 0 and after.max() <= 1
        means = (after - before).mean(axis=(1, 2), dtype=float)
        assert abs(means.mean() - effect) < 4 * means.std() / 4000**0.5


def test_clusters_share_their_effect_and_differ_in_size() -> None:
    cell = Cell(60, 50, "fractional", "skewed", 6, "unequal")
    sizes = np.bincount(cell.codes)
    assert sizes.sum() == 60 and sizes.max() > 8 * sizes.min() > 0
    ((before, after),) = studies(cell, 200, (1,))
    changes = (after - before).mean(axis=2)
    largest = changes[:, cell.codes == sizes.argmax()]
    assert np.corrcoef(largest[:, 0], largest[:, 1])[0, 1] > 0.7
    assert abs(np.corrcoef(changes[:, 0], changes[:, -1])[0, 1]) < 0.3


def test_what_others_do_is_done_as_they_do_it() -> None:
    before, after = np.random.default_rng(0).random((2, 3, 40, 4))
    half = half_widths(before, after)
    for i in range(3):
        run = stats.ttest_ind(after[i].mean(axis=0), before[i].mean(axis=0), equal_var=False)
        low, high = run.confidence_interval()
        assert half["welch over repeats"][i] == pytest.approx((high - low) / 2, rel=1e-9)
        error = np.sqrt((after[i].var(ddof=1) + before[i].var(ddof=1)) / 160)
        assert half["rollout level"][i] == pytest.approx(1.959963984540054 * error, rel=1e-9)
        tasks = [side[i].mean(axis=1) for side in (before, after)]
        error = np.sqrt(sum(side.var(ddof=1) for side in tasks) / 40)
        assert half["unpaired z"][i] == pytest.approx(1.959963984540054 * error, rel=1e-9)
    changes = np.random.default_rng(1).normal(size=20)
    low, high = stats.t.interval(0.95, 19, loc=changes.mean(), scale=stats.sem(changes))
    assert plain_cluster_half_width(changes[None], np.ones(20))[0] == pytest.approx((high - low) / 2, rel=1e-9)


def test_a_cell_tells_the_right_interval_from_wrong_ones() -> None:
    found = measure(Cell(50, 8, "fractional", "skewed"), 1000, 0)
    assert 0.03 < found.false_positives[OURS] < 0.07
    assert 0.03 < found.false_positives["sign flips"] < 0.07
    assert 0.03 < found.false_positives["bootstrap"] < 0.07
    assert found.false_positives["welch over repeats"] > 0.15
    assert 0.7 < found.power[OURS] < 0.95
    assert found.width[OURS] < found.width["unpaired z"]
    assert 0 < measure(Cell(50, 1, "binary", "even"), 500, 0).false_positives["mcnemar"] < 0.06
