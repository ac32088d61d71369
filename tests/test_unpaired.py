from __future__ import annotations

from pathlib import Path

import pytest

from gymtrl.errors import UserError
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.pool import Pool, open_pool
from gymtrl.selection.settings import FilterSettings
from gymtrl.selection.unpaired import choose_unpaired, kto_weights
from rows import row, write_rows


def pool_of(folder: Path, *tasks: list[tuple[str, float | None]]) -> Pool:
    rows = [
        row(f"question {task}", text, reward, index=task, repeat=repeat)
        for task, rollouts in enumerate(tasks)
        for repeat, (text, reward) in enumerate(rollouts)
    ]
    return open_pool(write_rows(folder / "rollouts.jsonl", rows), folder)


def test_labels_caps_and_reasons(tmp_path: Path) -> None:
    goods: list[tuple[str, float | None]] = [(f"g{i}", 1.0) for i in range(5)]
    bads: list[tuple[str, float | None]] = [(f"b{i}", 0.0) for i in range(6)]
    pool = pool_of(tmp_path, [*goods, *bads], [("b", 0.0), ("b", 0.0), ("?", None)], [("s", 1.0), ("s", 0.0)])
    choice = choose_unpaired(pool, cap_per_task=3)
    assert sorted(label for _, label in choice.labelled) == [False] * 4 + [True] * 3
    assert all(label == candidate.good for candidate, label in choice.labelled)
    counts = dict(choice.unused["reason"].value_counts().iter_rows())
    assert counts == {"over_cap": 5, "duplicate_completion": 1, "reward_missing": 1, "both_good_and_bad": 2}
    assert len(choice.labelled) + len(choice.unused) == 16


def test_the_best_are_kept_and_any_of_the_bad(tmp_path: Path) -> None:
    tasks = [[*((f"g{i}", 0.8 + i / 50) for i in range(8)), *((f"b{i}", i / 20) for i in range(8))]] * 1
    choice = choose_unpaired(pool_of(tmp_path, *tasks), cap_per_task=2)
    assert sorted(one.line for one, label in choice.labelled if label) == [7, 8]
    drawn = {
        tuple(sorted(one.line for one, label in found.labelled if not label))
        for found in (choose_unpaired(pool_of(tmp_path, *tasks), cap_per_task=2, seed=seed) for seed in range(6))
    }
    assert len(drawn) > 2


def test_good_and_bad_are_mixed_the_same_way_each_time(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, *([("g", 1.0), ("b", 0.0)] for _ in range(100)))
    choice = choose_unpaired(pool)
    labels = [label for _, label in choice.labelled]
    assert all(5 <= sum(labels[start : start + 20]) <= 15 for start in range(0, 200, 20))
    order = [one.line for one, _ in choice.labelled]
    assert order != sorted(order)
    assert order == [one.line for one, _ in choose_unpaired(pool).labelled]
    assert order != [one.line for one, _ in choose_unpaired(pool, seed=1).labelled]


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(10, 10, (1, 1)), (4, 3, (1, 1)), (3, 12, (4, 1)), (12, 3, (1, 3)), (7, 3, (1, 1.75))],
)
def test_weights_reach_the_nearer_bound(good: int, bad: int, expected: tuple[float, float]) -> None:
    assert kto_weights(good, bad) == pytest.approx(expected)


@pytest.mark.parametrize(("good", "bad", "lacking"), [(0, 3, "good"), (3, 0, "bad")])
def test_weights_need_both(good: int, bad: int, lacking: str) -> None:
    with pytest.raises(UserError, match=f"no {lacking} rollout"):
        kto_weights(good, bad)


def test_what_a_filter_found_to_be_nearly_the_same_is_left_out(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(60)]
    texts = [" ".join(words), " ".join([*words[:-1], "other"]), "quite another answer", "wrong"]
    rows = [row("q", text, float(text != "wrong"), repeat=repeat) for repeat, text in enumerate(texts)]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    filter_rollouts([path], tmp_path / "out", FilterSettings(validation=0, dedup="near", cap_per_task=1))
    choice = choose_unpaired(open_pool(tmp_path / "out", tmp_path))
    assert sorted(label for _, label in choice.labelled) == [False, True, True]
    assert choice.unused["reason"].to_list() == ["near_duplicate"]


def test_tasks_of_which_much_is_left_out_stand_anywhere(tmp_path: Path) -> None:
    few, often = [("g", 1.0), ("b", 0.0)], [("g", 1.0), *((f"b{i}", 0.0) for i in range(30))]
    choice = choose_unpaired(pool_of(tmp_path, *([few, often] * 40)), cap_per_task=1)
    places = [place for place, (one, label) in enumerate(choice.labelled) if not label and (one.line - 1) % 33 > 2]
    assert len(places) == 40
    assert 50 < sum(places) / 40 < 110
