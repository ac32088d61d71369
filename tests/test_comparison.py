"""Paired statistics: against textbook formulas, brute force and simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from gymtrl.comparison.compare import compare_files
from gymtrl.comparison.estimate import cluster_mean, sign_flip_p
from gymtrl.comparison.outcome import exit_status
from gymtrl.errors import UserError
from rows import row, write_rows


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


def rollouts(path: Path, rewards: list[list[float]], **more: object) -> Path:
    rows = [
        row(f"question {t}", f"answer {r}", reward, index=t, repeat=r, **more)
        for t, group in enumerate(rewards)
        for r, reward in enumerate(group)
    ]
    return write_rows(path, rows)


def test_improvement_is_paired_by_task(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", [[0, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 0]] * 3)
    after = rollouts(tmp_path / "a.jsonl", [[1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]] * 3)
    result = compare_files([before], [after])
    assert result.outcome == "improved"
    assert result.difference.mean == pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5 + 1) / 6)
    assert (result.better, result.worse, result.equal) == (15, 0, 3)
    assert (result.solved, result.lost) == (12, 0)
    assert result.difference.low > 0
    assert exit_status(result, "not-improved") == 0
    assert compare_files([after], [before]).outcome == "regressed"


def test_nothing_shown_says_what_could_have_been(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", [[0, 1], [1, 0], [1, 1], [0, 0]])
    after = rollouts(tmp_path / "a.jsonl", [[1, 0], [0, 0], [1, 1], [0, 1]])
    result = compare_files([before], [after])
    assert result.outcome == "not shown"
    assert f"{result.difference.detectable:.3f}" in result.verdict
    assert any("clusters" in w for w in result.warnings)
    assert exit_status(result, "not-improved") == 1
    assert exit_status(result, "regressed") == 0


def test_two_tasks_prove_nothing(tmp_path: Path) -> None:
    before, after = rollouts(tmp_path / "b.jsonl", [[0], [0]]), rollouts(tmp_path / "a.jsonl", [[1], [1]])
    result = compare_files([before], [after])
    assert (result.outcome, result.sign_flip_p) == ("not shown", 0.5)
    assert "so few clusters" in result.verdict


def test_sign_flips_match_the_exact_test() -> None:
    # Eight positive differences of equal size: only two of 2^8 patterns are as extreme.
    assert sign_flip_p([0.5] * 8, range(8)) == pytest.approx(2 / 2**8)
    assert sign_flip_p([0.5] * 8, [0, 0, 0, 0, 1, 1, 1, 1]) == pytest.approx(2 / 2**2)
    x = np.random.default_rng(5).normal(0.3, 1, size=40)
    assert sign_flip_p(x, range(40)) == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.02)


def test_invalid_rewards_are_left_out_and_told(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", [[0], [1], [0]])
    after = rollouts(tmp_path / "a.jsonl", [[1], [1], [1]])
    with after.open("a") as stream:
        stream.write(write_rows(tmp_path / "x.jsonl", [row("question 0", "z", 0.0, mask_sample=True)]).read_text())
        stream.write("not json\n")
    result = compare_files([before], [after])
    assert result.after.mean == 1
    assert result.left_out == 2


@pytest.mark.parametrize(
    ("rewards", "more", "message"),
    [
        ([[1]], {}, "share one task"),
        ([], {}, "no rollout with a valid reward"),
        ([[1], [0]], {"agent_ref": {"name": "other"}}, "collected by differently"),
        ([[1], [0]], {"responses_create_params": {"input": "question 0", "temperature": 0.2}}, "sampled differently"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, rewards: list[list[float]], more: dict[str, object], message: str
) -> None:
    before = rollouts(tmp_path / "b.jsonl", [[0], [1]])
    after = rollouts(tmp_path / "a.jsonl", rewards, **more)
    with pytest.raises(UserError, match=message):
        compare_files([before], [after])


def test_different_tasks_are_refused(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", [[0], [1]])
    after = write_rows(tmp_path / "a.jsonl", [row("something else", "x", 1.0), row("another", "x", 1.0, index=1)])
    with pytest.raises(UserError, match="no task in common"):
        compare_files([before], [after])
