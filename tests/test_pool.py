from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gymtrl.errors import UserError
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.lines import read_rollout
from gymtrl.selection.pool import Pool, open_pool
from gymtrl.selection.settings import FilterSettings
from rows import row, write_rows


def filtered(path: Path, **settings: Any) -> Pool:
    out = path.parent / "filtered"
    filter_rollouts([path], out, FilterSettings(**settings))
    return open_pool(out, path.parent)


def reasons(pool: Pool) -> list[str | None]:
    return pool.rows["reason"].to_list()


def many(tasks: int = 30) -> list[dict[str, Any]]:
    return [
        row(f"question {task}", f"answer {repeat}", float(repeat < 2), index=task, repeat=repeat)
        for task in range(tasks)
        for repeat in range(4)
    ]


def test_what_a_filter_dropped_for_its_reward_or_its_number_can_be_used(tmp_path: Path) -> None:
    truncated = row("q", "cut", 0.0, repeat=5)
    truncated["response"]["status"] = "incomplete"
    rows = [
        row("q", "right", 1.0),
        row("q", "right", 1.0, repeat=1),
        row("q", "also right", 1.0, repeat=2),
        row("q", "wrong", 0.0, repeat=3),
        row("q", "the world broke", 0.0, repeat=4, mask_sample=True),
        truncated,
        row("q", "not scored", None, repeat=6),
    ]
    pool = filtered(write_rows(tmp_path / "rollouts.jsonl", rows), validation=0, cap_per_task=1)
    assert reasons(pool) == [None] * 4 + ["masked", "truncated", "reward_missing"]
    assert pool.rows["kept"].sum() == 1
    assert pool.rows["good"].to_list() == [True, True, True, False, None, False, None]
    assert [one.reward for one in pool.candidates([3, 4, 6])] == [0.0, None, None]
    assert pool.threshold == 1.0


def test_what_the_user_left_out_stays_out(tmp_path: Path) -> None:
    rows = [
        *(row("easy", f"a{i}", float(i > 0), repeat=i) for i in range(10)),
        *(row("fair", f"a{i}", float(i > 4), index=1, repeat=i) for i in range(10)),
        row("fair", "other", 0.0, index=1, repeat=10, agent_ref={"name": "other"}),
        row("easy", "cut", 0.0, repeat=10),
        row("fair", "cut", 0.0, index=1, repeat=11),
    ]
    for cut in rows[21:]:
        cut["response"]["status"] = "incomplete"
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    pool = filtered(path, validation=0, pass_rate="0.1-0.8", agents=["agent"])
    # The bad rollout of the easy task was below the threshold before its task was looked at.
    assert reasons(pool) == ["pass_rate"] * 10 + [None] * 10 + ["other_agent"] + ["truncated"] * 2
    assert not pool.rows["counts"][20]
    assert pool.rows["cut"].to_list() == [False] * 22 + [True]


@pytest.mark.parametrize(
    ("change", "settings", "reason", "counts"),
    [
        ({"reward": 2.0}, {"max_reward": 1.0}, "above_max_reward", True),
        ({"reward": 2.0}, {"where": "reward < 2"}, "where", True),
        ({"text": "again and again " * 40, "reward": 1.0}, {"max_repetition": 0.5}, "repetitive", True),
        ({"agent_ref": {"name": "a"}}, {"exclude_agents": ["a"]}, "other_agent", False),
        ({"_ng_environment_server": "e"}, {"exclude_environments": ["e"]}, "other_environment", False),
        ({"text": "<think>hm</think>"}, {}, "ends_in_reasoning", True),
    ],
)
def test_each_reason_to_leave_out_holds_for_what_was_cut_off_too(
    change: dict[str, Any], settings: dict[str, Any], reason: str, counts: bool, tmp_path: Path
) -> None:
    made = {"reward": 0.0} | change
    text, reward = made.pop("text", "other"), made.pop("reward")
    rows = [row("q", "right", 1.0), row("q", "wrong", 0.0, repeat=1)]
    rows += [row("q", text, reward, repeat=2, **made), row("q", text, reward, repeat=3, **made)]
    rows.append(row("q", "cut", 0.0, repeat=4))
    for one in rows[3:]:
        one["response"] = one["response"] | {"status": "incomplete"}
    pool = filtered(write_rows(tmp_path / "rollouts.jsonl", rows), validation=0, reward_threshold=1.0, **settings)
    assert reasons(pool) == [None, None, reason, "truncated", "truncated"]
    assert pool.rows["counts"][2] == counts
    assert pool.rows["cut"].to_list() == [False] * 4 + [True]
    assert pool.rows["whole"].to_list() == [True, True, reason != "ends_in_reasoning", False, False]


def test_what_a_benchmark_holds_stays_out_when_cut_off(tmp_path: Path) -> None:
    asked = "How many of the seven blue herons by the old mill pond flew away before the frost came?"
    rows = [row(q, a, 0.0, index=i, repeat=k) for i, q in enumerate((asked, "q")) for k, a in enumerate("abc")]
    for one in rows[2::3]:
        one["response"]["status"] = "incomplete"
    rows += [row("q", "right", 1.0, index=1, repeat=3)]
    benchmark = write_rows(tmp_path / "benchmark.jsonl", [row(asked, "three", 1.0)])
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    pool = filtered(path, validation=0, reward_threshold=1.0, benchmark=[benchmark])
    assert reasons(pool) == ["contaminated"] * 2 + ["truncated", None, None, "truncated", None]
    assert pool.rows["cut"].to_list() == [False] * 5 + [True, False]


def test_bytes_come_from_the_filter_folder(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, many())
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n") + b"broken\n")
    pool = filtered(path)
    path.unlink()
    assert set(pool.rows["side"]) == {"train", "validation"}
    for candidate in pool.candidates(range(120)):
        repeat = (candidate.line - 2) % 4
        assert candidate.file == str(path)
        assert read_rollout(candidate.origin).completion[0].content == f"answer {repeat}"
        at = (tmp_path / "filtered" / Path(candidate.origin.file).name).read_bytes().splitlines()
        assert json.loads(at[candidate.origin.line - 1])["_ng_rollout_index"] == repeat


def test_what_was_dropped_is_on_the_side_of_its_task(tmp_path: Path) -> None:
    pool = filtered(write_rows(tmp_path / "rollouts.jsonl", many()), validation=0.3)
    sides = pool.rows.group_by("cluster_key").agg(pl.col("side").unique(), pl.len())
    assert sides["side"].list.len().to_list() == [1] * 30
    held_out = set(pool.rows.filter(side="validation")["cluster_key"])
    kept = pl.read_parquet(tmp_path / "filtered" / "table.parquet").filter(split="validation")
    assert held_out == set(kept["cluster_key"])


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    filtered(write_rows(tmp_path / "rollouts.jsonl", many()))
    with (tmp_path / "filtered" / "dropped.jsonl").open("a") as target:
        target.write("{}\n")
    with pytest.raises(UserError, match=r"dropped\.jsonl is not the file"):
        open_pool(tmp_path / "filtered", tmp_path)


def test_rollout_files_are_judged_by_the_default_rules(tmp_path: Path) -> None:
    rows = [
        row("q", "right", 0.9),
        row("q", "wrong", 0.3, repeat=1),
        row("q", "<think>hm", 0.9, repeat=2),
        row("q", "?", None, repeat=3),
    ]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    pool = open_pool(path, tmp_path)
    assert reasons(pool) == [None, None, "unbalanced_think", "reward_missing"]
    assert pool.rows["good"].to_list() == [True, False, True, None]
    assert pool.rows["side"].unique().to_list() == ["train"]
    assert open_pool(path, tmp_path, reward_threshold=0.2).rows["good"].to_list() == [True, True, True, None]
    assert read_rollout(pool.candidates([1])[0].origin).completion[0].content == "wrong"
    with pytest.raises(UserError, match="threshold already"):
        filter_rollouts([path], tmp_path / "filtered", FilterSettings(validation=0))
        open_pool(tmp_path / "filtered", tmp_path, reward_threshold=0.2)


def test_environments_with_their_own_thresholds_and_none(tmp_path: Path) -> None:
    def of(agent: str, reward: float, repeat: int) -> dict[str, Any]:
        return row(agent, f"a{repeat}", reward, repeat=repeat, agent_ref={"name": agent})

    rows = [of("binary", 1.0, 0), of("binary", 0.0, 1), of("signed", 3.5, 0), of("signed", -1.0, 1), of("signed", 0, 2)]
    pool = open_pool(write_rows(tmp_path / "rollouts.jsonl", rows), tmp_path)
    assert pool.rows["good"].to_list() == [True, False, None, None, None]
    pool.require_threshold()
    nothing = open_pool(write_rows(tmp_path / "rollouts.jsonl", rows[2:]), tmp_path)
    with pytest.raises(UserError, match="not for gymtrl to say"):
        nothing.require_threshold()


def test_an_incomplete_response_is_never_a_side(tmp_path: Path) -> None:
    cut = row("q", "cut", 1.0)
    cut["response"]["status"] = "incomplete"
    path = write_rows(tmp_path / "rollouts.jsonl", [cut, row("q", "whole", 1.0, repeat=1)])
    pool = filtered(path, validation=0, keep_truncated=True)
    assert reasons(pool) == ["truncated", None]
    assert pool.rows["kept"].to_list() == [True, True]
