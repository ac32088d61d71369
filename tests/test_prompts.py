from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.pool import Pool, open_pool
from gymtrl.selection.prompts import choose_prompts
from gymtrl.selection.rollout_groups import choose_groups
from gymtrl.selection.settings import FilterSettings
from rows import row, write_rows


def pool_of(folder: Path, *tasks: list[float | None]) -> Pool:
    return open_pool(write(folder, *tasks), folder)


def write(folder: Path, *tasks: list[float | None]) -> Path:
    """A reward of `None` is one that the world spoiled."""
    rows: list[dict[str, Any]] = []
    for task, rewards in enumerate(tasks):
        for repeat, reward in enumerate(rewards):
            masked = {} if reward is not None else {"mask_sample": True}
            rows.append(row(f"q{task}", f"a{repeat}", reward or 0.0, index=task, repeat=repeat, **masked))
    return write_rows(folder / "rollouts.jsonl", rows)


def test_tasks_that_are_solved_now_and_then(tmp_path: Path) -> None:
    tasks: list[list[float | None]] = [[1.0, 0.0, None, None] for _ in range(18)]
    tasks += [[0.0, 0.0] for _ in range(5)] + [[1.0, 1.0], [1.0] + [0.0] * 11]
    choice = choose_prompts(pool_of(tmp_path, *tasks))
    rates = Counter((prompt.pass_rate, prompt.rollouts) for prompt in choice.prompts)
    assert rates == {(0.5, 2): 18, (0.0, 2): 2}
    assert [prompt.candidate.line for prompt in choice.prompts[:2]] == [1, 5]
    counts = Counter(choice.unused["reason"])
    assert counts == {
        "masked": 36,
        "same_task": 18 + 5 + 1 + 11,
        "never_solved": 3,
        "solved_too_often": 1,
        "solved_too_seldom": 1,
    }
    assert len(choice.prompts) + len(choice.unused) == 96
    assert not any(p.pass_rate == 0 for p in choose_prompts(pool_of(tmp_path, *tasks), zero_share=0).prompts)
    with pytest.raises(UserError, match="band"):
        choose_prompts(pool_of(tmp_path, *tasks), pass_rate=(0.9, 0.1))


def test_a_filter_folder_has_the_pass_rates_of_all_rollouts(tmp_path: Path) -> None:
    tasks: list[list[float | None]] = [[1.0] * 6 + [0.0] * 2 for _ in range(40)] + [[0.0] * 8 for _ in range(40)]
    filter_rollouts([write(tmp_path, *tasks)], tmp_path / "out", FilterSettings(cap_per_task=1, validation=0.4))
    choice = choose_prompts(open_pool(tmp_path / "out", tmp_path), zero_share=0.2)
    assert {prompt.pass_rate for prompt in choice.prompts} == {0.75, 0.0}
    for side in ("train", "validation"):
        rates = [prompt.pass_rate for prompt in choice.prompts if prompt.candidate.side == side]
        assert rates.count(0.0) == rates.count(0.75) // 4 > 0


def test_groups_of_one_size_whose_rewards_differ(tmp_path: Path) -> None:
    tasks: list[list[float | None]] = [
        [1.0, 0.0, 0.0, None],
        [1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 1.0],
        [1.0, 0.0],
        [1.0] + [0.0] * 7,
        [1.0],
        [0.0, None, None, None],
    ]
    choice = choose_groups(pool_of(tmp_path, *tasks))
    assert choice.size == 4
    assert [[one.reward for one in group] for group in choice.groups[:2]] == [[1, 0, 0, None], [1, 1, 0, 0]]
    assert sorted(one.reward or 0.0 for one in choice.groups[2]) == [0, 0, 0, 1]
    assert len({group[0].group for group in choice.groups}) == 3
    counts = Counter(choice.unused["reason"])
    assert counts == {"no_variance": 5, "masked": 3, "group_too_small": 3, "over_size": 4}
    assert sum(map(len, choice.groups)) + len(choice.unused) == 27


@pytest.mark.parametrize("seed", range(8))
def test_smaller_groups_keep_their_variance_and_lose_what_failed(tmp_path: Path, seed: int) -> None:
    pool = pool_of(tmp_path, [None, *[0.0] * 9, 1.0, None], [0.0, *[1.0] * 9])
    choice = choose_groups(pool, 3, seed=seed)
    assert [sorted({one.reward for one in group}, key=str) for group in choice.groups] == [[0.0, 1.0]] * 2
    assert [len(group) for group in choice.groups] == [3, 3]


def test_groups_need_no_threshold_and_two_members(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [3.5, -2.0, 0.0])
    assert [one.reward for one in choose_groups(pool).groups[0]] == [3.5, -2.0, 0.0]
    with pytest.raises(UserError, match="nothing to compare"):
        choose_groups(pool, 1)
    assert choose_groups(pool_of(tmp_path, [1.0, 1.0])).groups == []


def test_one_task_asked_by_two_agents(tmp_path: Path) -> None:
    rows = [
        row("ask", "wrong", 0.0, repeat=0, agent_ref={"name": "a"}),
        row("ask", "right", 1.0, repeat=1, agent_ref={"name": "a"}),
        *(row("ask kindly", f"right {i}", 1.0, repeat=i, agent_ref={"name": "b"}) for i in (2, 3)),
    ]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    inputs = [
        {"responses_create_params": {"input": "?"}, "_ng_task_index": 0, "_ng_rollout_index": repeat}
        for repeat in (1, 2, 3)
    ]
    write_rows(tmp_path / "rollouts_materialized_inputs.jsonl", inputs)
    (prompt,) = choose_prompts(open_pool(path, tmp_path)).prompts
    # The first line has no input row; all are one task.
    assert (prompt.pass_rate, prompt.rollouts, prompt.candidate.line) == (0.75, 4, 2)
    filter_rollouts([path], tmp_path / "out", FilterSettings(validation=0, agents=["a"]))
    (prompt,) = choose_prompts(open_pool(tmp_path / "out", tmp_path)).prompts
    assert (prompt.pass_rate, prompt.rollouts) == (0.5, 2)


def test_what_failed_halfway_is_in_no_group(tmp_path: Path) -> None:
    cut = row("q", "cut", 0.0, repeat=2, mask_sample=True)
    cut["response"]["status"] = "incomplete"
    path = write_rows(tmp_path / "rollouts.jsonl", [row("q", "a", 1.0), row("q", "b", 0.0, repeat=1), cut])
    choice = choose_groups(open_pool(path, tmp_path))
    assert [[one.line for one in group] for group in choice.groups] == [[1, 2]]
    assert choice.unused["reason"].to_list() == ["masked"]


def test_what_was_cut_off_is_in_its_group(tmp_path: Path) -> None:
    rows = [
        row(f"q{task}", f"a{repeat}", float(repeat == task), index=task, repeat=repeat)
        for task in range(2)
        for repeat in range(4)
    ]
    for place in (1, 2, 6, 7):
        rows[place]["response"]["status"] = "incomplete"
    rows[7]["response"]["output"][0]["content"][0]["text"] = "<think>hm</think>"
    choice = choose_groups(open_pool(write_rows(tmp_path / "rollouts.jsonl", rows), tmp_path), 4)
    assert [[(one.line, one.reward) for one in group] for group in choice.groups] == [[(1, 1), (2, 0), (3, 0), (4, 0)]]
    # Of the other group one has a fault besides.
    assert choice.unused["reason"].to_list() == ["group_too_small"] * 3 + ["truncated"]


def test_an_index_that_was_asked_different_things_groups_by_task(tmp_path: Path) -> None:
    asked = [("p", "a", 1.0), ("q", "a", 0.0), ("p", "b", 0.0), ("q", "b", 1.0)]
    path = write_rows(tmp_path / "rollouts.jsonl", [row(*one, repeat=i) for i, one in enumerate(asked)])
    choice = choose_groups(open_pool(path, tmp_path))
    assert [[one.line for one in group] for group in choice.groups] == [[1, 3], [2, 4]]
    assert all(group[0].group for group in choice.groups)
