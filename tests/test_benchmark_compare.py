"""The benchmark of comparing: both sides find the same difference, and its rows are rollouts of about 2 kB."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import baseline, ours, write_collection

from gymtrl.rollouts.reader import read_lines


def test_both_sides_find_the_same(tmp_path: Path) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    write_collection(before, 40, 4, seed=1, gain=0.0)
    write_collection(after, 40, 4, seed=2, gain=0.5)
    mine, theirs = ours(before, after), baseline(before, after)
    assert (mine["tasks"], theirs["tasks"], mine["rollouts"]) == (40, 40, 160)
    assert mine["mean"] == pytest.approx(theirs["mean"], abs=1e-12)
    assert (mine["low"], mine["high"]) == pytest.approx((theirs["low"], theirs["high"]), abs=0.02)
    lines = list(read_lines([before]))
    assert {line.verdict for line in lines} == {"ok"}
    assert 1600 < before.stat().st_size / len(lines) < 2400
