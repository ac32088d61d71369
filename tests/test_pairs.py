from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Rollout
from gymtrl.selection.divergence import first_divergence
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.pairs import PairChoice, PairRules, choose_pairs
from gymtrl.selection.pool import Pool, open_pool
from gymtrl.selection.settings import FilterSettings
from rows import row, write_rows


def pool_of(folder: Path, *tasks: list[tuple[str, float | None]]) -> Pool:
    rows = [
        row(f"question {task}", text, reward, index=task, repeat=repeat)
        for task, rollouts in enumerate(tasks)
        for repeat, (text, reward) in enumerate(rollouts)
    ]
    return open_pool(write_rows(folder / "rollouts.jsonl", rows), folder)


def lines(choice: PairChoice) -> list[tuple[int, int]]:
    return [(pair.chosen.line, pair.rejected.line) for pair in choice.pairs]


def unused(choice: PairChoice) -> dict[int, str]:
    return dict(choice.unused.select("line", "reason").iter_rows())


FRACTIONAL = [("best", 1.0), ("fine", 0.85), ("nearly", 0.7), ("half", 0.5), ("worst", 0.0)]


def test_strategies_choose_the_rejected_side(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, FRACTIONAL, [("a", 0.8), ("b", 0.7)])
    assert lines(choose_pairs(pool, PairRules("margin"))) == [(1, 5)]
    assert lines(choose_pairs(pool, PairRules("max_min"))) == [(1, 5), (6, 7)]
    assert lines(choose_pairs(pool, PairRules("margin", margin=0.1))) == [(1, 5), (6, 7)]
    # Mean 0.83, standard deviation 0.22: 0.39 is looked for, and 0 is too easy.
    often = [*((f"good {i}", 0.9) for i in range(20)), ("low", 0.3), ("high", 0.6), ("worst", 0.0)]
    choice = choose_pairs(pool_of(tmp_path, often), PairRules())
    assert (choice.strategy, choice.margin) == ("sweet_spot", 0.2)
    assert [rejected for _, rejected in lines(choice)] == [21]
    even = pool_of(tmp_path, [("answer", 1.0), ("a", 0.3), ("longer", 0.3), ("the longest of all", 0.3)])
    assert lines(choose_pairs(even, PairRules("sweet_spot"))) == [(1, 3)]
    signed = pool_of(tmp_path, [("good", 1.0), ("bad", -5.0), ("worse", -6.0)])
    with pytest.raises(UserError, match="not for gymtrl to say"):
        choose_pairs(signed, PairRules())


def test_binary_rewards_are_matched_by_length(tmp_path: Path) -> None:
    rollouts = [("x" * 40, 0.0), ("x" * 12, 0.0), ("x" * 10, 1.0), ("x", 0.0)]
    choice = choose_pairs(pool_of(tmp_path, rollouts), PairRules())
    assert (choice.strategy, choice.margin) == ("length_matched", 0.5)
    assert lines(choice) == [(3, 2)]
    assert unused(choice) == {1: "not_paired", 4: "not_paired"}


def test_the_margin_of_binary_rewards_is_half_their_range(tmp_path: Path) -> None:
    # What is neither good nor bad does not count.
    rows = [row("q", "right", 0.9), row("q", "wrong", 0.6, repeat=1), row("q", "unmeasured", None, repeat=2)]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    pool = open_pool(path, tmp_path, reward_threshold=0.8)
    assert pool.is_binary()
    choice = choose_pairs(pool, PairRules())
    assert lines(choice) == [(1, 2)] and choice.margin == pytest.approx(0.15)
    assert choose_pairs(pool, PairRules("max_min")).margin == 0
    unknown = pool.rows.vstack(pool.rows.with_columns(reward=pl.lit(0.1), good=pl.lit(None, pl.Boolean)))
    assert replace(pool, rows=unknown).is_binary()


def test_tasks_without_a_pair_go_through_the_others_once(tmp_path: Path) -> None:
    task = [("g1", 1.0), ("g2", 1.0), ("b1", 0.0), ("b2", 0.0)]
    choice = choose_pairs(pool_of(tmp_path, task, task, [("g", 1.0), ("b", 0.0)]), PairRules())
    first, second, third = choice.pairs
    assert list(choice.others({third.task})) == [] == list(choice.others(set()))
    tasks = {first.task, second.task}
    rounds = choice.others(tasks)
    tried = next(rounds)
    assert [pair.task for pair in tried] == [first.task, second.task]
    tasks.discard(first.task)
    tried += [pair for pairs in rounds for pair in pairs]
    assert [pair.task for pair in tried] == [first.task] + 3 * [second.task]
    found = {(pair.chosen.line, pair.rejected.line) for pair in (second, *tried[1:])}
    assert found == {(5, 7), (5, 8), (6, 7), (6, 8)}


def test_every_line_is_used_or_has_its_reason(tmp_path: Path) -> None:
    tasks = [
        FRACTIONAL,
        [("good", 0.9), ("good", 0.9), ("also", 1.0)],
        [("bad", 0.1), ("worse", 0.0), ("?", None)],
        [("a", 0.8), ("b", 0.7)],
        [("same", 1.0), ("same", 0.0), ("right", 1.0), ("wrong", 0.2)],
    ]
    choice = choose_pairs(pool_of(tmp_path, *tasks), PairRules())
    assert lines(choice) == [(1, 5), (16, 17)]
    assert len(choice.unused) + 2 * len(choice.pairs) == 17
    why = unused(choice)
    assert [why[line] for line in (2, 3, 4)] == ["not_paired"] * 3
    assert sorted(why[line] for line in (6, 7, 8)) == ["duplicate_completion", "no_bad_rollout", "no_bad_rollout"]
    assert [why[line] for line in (9, 10, 11)] == ["no_good_rollout", "no_good_rollout", "reward_missing"]
    assert [why[line] for line in (12, 13)] == ["margin_too_small"] * 2
    assert [why[line] for line in (14, 15)] == ["both_good_and_bad"] * 2


def test_a_rollout_is_used_again_only_where_there_is_no_other(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [("g1", 1.0), ("g2", 1.0), ("b1", 0.0), ("b2", 0.0), ("b3", 0.0)])
    two = lines(choose_pairs(pool, PairRules(pairs_per_task=2)))
    assert {good for good, _ in two} == {1, 2} and len({bad for _, bad in two}) == 2
    three = lines(choose_pairs(pool, PairRules(pairs_per_task=3)))
    assert {bad for _, bad in three} == {3, 4, 5}
    assert len(set(lines(choose_pairs(pool, PairRules(pairs_per_task=99))))) == 6


def test_equals_are_drawn_by_the_seed(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [*((f"g{i}", 1.0) for i in range(8)), *((f"b{i}", 0.0) for i in range(8))])
    found = [lines(choose_pairs(pool, PairRules("margin", seed=seed))) for seed in range(5)]
    assert found[0] == lines(choose_pairs(pool, PairRules("margin")))
    assert len({str(pairs) for pairs in found}) > 1


def test_tasks_of_one_input_row_are_one_but_pairs_share_their_prompt(tmp_path: Path) -> None:
    # The same input row, asked by two agents in two ways.
    rows = [
        row("ask kindly", "right", 1.0, agent_ref={"name": "a"}),
        row("ask", "wrong", 0.0, repeat=1, agent_ref={"name": "b"}),
    ]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    inputs = [{"responses_create_params": {"input": "?"}, "_ng_task_index": 0, "_ng_rollout_index": i} for i in (0, 1)]
    write_rows(tmp_path / "rollouts_materialized_inputs.jsonl", inputs)
    pool = open_pool(path, tmp_path)
    assert pool.rows["input_key"].n_unique() == 1 and pool.rows["task"].n_unique() == 1
    assert unused(choose_pairs(pool, PairRules())) == {1: "prompt_differs", 2: "prompt_differs"}


def test_pairs_of_a_filter_folder_use_what_it_dropped(tmp_path: Path) -> None:
    rows = [row(f"q{task}", f"a{i}", float(i == 0), index=task, repeat=i) for task in range(20) for i in range(3)]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    filter_rollouts([path], tmp_path / "out", FilterSettings(validation=0.3))
    path.unlink()
    choice = choose_pairs(open_pool(tmp_path / "out", tmp_path), PairRules())
    assert len(choice.pairs) == 20
    assert {pair.chosen.side for pair in choice.pairs} == {"train", "validation"}
    assert all(pair.chosen.side == pair.rejected.side for pair in choice.pairs)


def call(arguments: str, name: str = "f", call_id: str = "1") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def result(text: str, call_id: str = "1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([said("a")], [said("b")], 0),
        ([said("a")], [said("a")], "same_completion"),
        ([call('{"x": 1}'), result("7"), said("a")], [call('{"x":1}', call_id="2"), result("7", "2"), said("b")], 2),
        ([call('{"x": 1}'), result("7"), said("a")], [call('{"x": true}'), result("7"), said("a")], 0),
        ([call("{}"), result("7"), said("a")], [call("{}"), result("8"), said("b")], "diverges_in_environment"),
        ([call("{}"), result("7"), said("a")], [call("{}"), result("7")], "diverges_in_environment"),
    ],
)
def test_first_divergence(tmp_path: Path, left: Any, right: Any, expected: int | str) -> None:
    def rollout(question: str, output: Any, words: str = "") -> Rollout:
        made = row(question, "", 1.0)
        tool = {
            "type": "function",
            "name": "f",
            "description": words,
            "parameters": {"type": "object", "properties": {}},
        }
        made["responses_create_params"]["tools"] = [tool]
        made["response"]["output"] = output
        (line,) = read_lines([write_rows(tmp_path / "r.jsonl", [made])])
        assert line.rollout is not None
        return line.rollout

    assert first_divergence(rollout("q", left), rollout("q", right)) == expected
    assert first_divergence(rollout("q", left), rollout("other", right)) == "prompt_differs"
    assert first_divergence(rollout("q", left), rollout("q", right, "of another tool")) == "prompt_differs"


def test_both_sides_of_a_pair_were_asked_in_the_same_words(tmp_path: Path) -> None:
    short, long = "x" * 5, "x" * 50
    asked = [("kindly", short, 1.0), ("kindly", long + "y", 0.0), ("rudely", long, 1.0), ("rudely", short + "y", 0.0)]
    path = write_rows(tmp_path / "rollouts.jsonl", [row(*one, repeat=i) for i, one in enumerate(asked)])
    inputs = [
        {"responses_create_params": {"input": "?"}, "_ng_task_index": 0, "_ng_rollout_index": i} for i in range(4)
    ]
    write_rows(tmp_path / "rollouts_materialized_inputs.jsonl", inputs)
    choice = choose_pairs(open_pool(path, tmp_path), PairRules(pairs_per_task=9))
    assert sorted(lines(choice)) == [(1, 2), (3, 4)]
    assert len(choose_pairs(open_pool(path, tmp_path), PairRules()).pairs) == 1


def test_pairs_stand_in_the_order_of_the_table(tmp_path: Path) -> None:
    tasks = [(f"question {task}", text, reward) for task in range(9) for text, reward in (("g", 1.0), ("b", 0.0))]
    for order in (tasks, tasks[::-1]):
        path = write_rows(tmp_path / "rollouts.jsonl", [row(*task, index=i // 2) for i, task in enumerate(order)])
        found = lines(choose_pairs(open_pool(path, tmp_path), PairRules()))
        assert found == sorted(found) and len(found) == 9
