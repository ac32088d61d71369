"""The benchmark of training reads what a run has logged, whoever logged it, and says what did not hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train import missed, missing
from train_runs import Mark, Run, history, steps_logged

PRINTED = """{'loss': '2.5', 'num_tokens': '1.235e+04'}
 50%|##        | 1/2 [00:01<00:01]{'loss': '2.25', 'num_tokens': '2.469e+04'}
{'train_runtime': '3', 'train_loss': '2.4'}
"""
WRITTEN = [{"step": 1, "loss": 2.5, "tokens": 12345}, {"step": 1, "event": "x"}, {"step": 2, "loss": 2.25}]


def test_a_step_is_counted_once_it_is_whole() -> None:
    assert steps_logged(PRINTED) == 2
    text = "\n".join(json.dumps(line) for line in WRITTEN)
    assert steps_logged(text) == 2
    assert steps_logged(text[:-3]) == 1


def test_tokens_come_from_where_they_have_all_digits(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / "trl" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        steps = [{"loss": 1.0, "num_tokens": 12345.0 * n, "step": n} for n in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*steps, {"train_loss": 1.0}]}))
    assert [line["tokens"] for line in history(tmp_path / "trl")] == [12345 * n for n in range(1, 11)]


def test_a_rate_leaves_out_the_first_step() -> None:
    run = Run([Mark(1, 100, 50.0, 30.0), Mark(2, 300, 52.0, 31.0), Mark(3, 700, 58.0, 33.0)], 70.0, 40.0, Path())
    found = run.result()
    assert (found["tokens"], found["tokens_per_cpu_s"], found["tokens_per_s"]) == (600, 75.0, 200.0)
    assert run.between(1, 2)["tokens_per_cpu_s"] == 100.0


def test_the_overhead_is_that_of_steps_with_the_same_rows() -> None:
    fast, slow = [(1.02, 1.0), (2.04, 2.0)], [(1.53, 1.5), (3.06, 3.0)]  # the machine got slower between the rounds
    found = missing([fast, slow])
    assert found["share"] == pytest.approx(1 - 1 / 1.02) and found["high"] - found["low"] < 1e-9
    assert missing([[(1.0, 1.0), (1.1, 1.0)]])["low"] < 0 < missing([[(1.0, 1.0), (1.1, 1.0)]])["high"]


@pytest.mark.parametrize(
    ("overhead", "times", "gained", "failed"),
    [(0.02, 2.1, 0.96, 0), (0.03, 2.1, 1.0, 1), (0.02, 1.9, 1.2, 1), (0.02, 2.1, 0.9, 1)],
)
def test_what_does_not_hold_is_said(overhead: float, times: float, gained: float, failed: int) -> None:
    compared = {"ours_to_trl": {"times_tokens_per_cpu_s": times, "times_gained": gained}}
    found: dict[str, Any] = {"agreement": {"unexplained": 0}, "overhead": {"share": overhead}}
    assert len(missed(found | {"compared": compared})) == failed
