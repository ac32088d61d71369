"""Every option of the filter at its boundary, and what holds for all of them together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gymtrl.errors import UserError
from gymtrl.rollouts.keys import input_key
from gymtrl.rollouts.scan import write_table
from gymtrl.selection.filter import FilterResult, filter_rollouts
from gymtrl.selection.funnel import preview_filter
from gymtrl.selection.lines import _SPAN, read_rollout
from gymtrl.selection.rules import RULES
from gymtrl.selection.settings import FilterSettings

SPLITS = ("train", "validation", "dropped")
LOREM = (
    "the quick brown fox jumps over the lazy dog while nine wise owls watch from an old oak near the quiet river bank"
)


def row(task: int, repeat: int, reward: float | None = 1.0, text: str | None = None, **more: Any) -> dict[str, Any]:
    said = {"type": "message", "role": "assistant", "content": f"answer {repeat}" if text is None else text}
    made = {
        "responses_create_params": {"input": f"question {task}"},
        "response": {"output": [said], "model": "m"},
        "reward": reward,
        "_ng_task_index": task,
        "_ng_rollout_index": repeat,
        "agent_ref": {"name": "a"},
    }
    return made | more


def calling(task: int, calls: int) -> dict[str, Any]:
    """A rollout with as many calls, each in a turn of its own, and one turn more."""
    output: list[dict[str, Any]] = []
    for i in range(calls):
        output.append({"type": "function_call", "call_id": f"c{i}", "name": "f", "arguments": "{}"})
        output.append({"type": "function_call_output", "call_id": f"c{i}", "output": "x"})
    output.append({"type": "message", "role": "assistant", "content": "done"})
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
    asked = {"input": f"question {task}", "tools": tools}
    return row(task, 0, responses_create_params=asked, response={"output": output, "model": "m"})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def run(path: Path, **given: Any) -> FilterResult:
    given.setdefault("validation", 0)
    return filter_rollouts([path], path.parent / "out", FilterSettings(**given))


def outcomes(result: FilterResult) -> list[str]:
    table = pl.read_parquet(result.path / "table.parquet", columns=["split", "drop_reason"])
    return [reason or split for split, reason in table.iter_rows()]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def assert_whole(folder: Path, *sources: Path) -> None:
    """Every line that is not blank is in exactly one of the three files, byte for byte."""
    out = [line for split in SPLITS for line in (folder / f"{split}.jsonl").read_bytes().split(b"\n") if line]
    lines = (line.rstrip(b"\r") for path in sources for line in path.read_bytes().split(b"\n") if line.strip())
    assert Counter(out) == Counter(lines)


@pytest.mark.parametrize(
    ("setting", "bound", "kept", "dropped", "reason"),
    [
        ("max_turns", 3, calling(0, 2), calling(1, 3), "too_many_turns"),
        ("max_tool_calls", 2, calling(0, 2), calling(1, 3), "too_many_tool_calls"),
        ("require_tool_use", True, calling(0, 1), calling(1, 0), "no_tool_use"),
        ("max_completion_chars", 5, row(0, 0, text="x" * 5), row(1, 0, text="x" * 6), "completion_too_long"),
        ("min_completion_chars", 5, row(0, 0, text="x" * 5), row(1, 0, text="x" * 4), "completion_too_short"),
        ("max_prompt_chars", 10, row(0, 0), row(10, 0), "prompt_too_long"),
        ("max_reward", 0.9, row(0, 0, 0.9), row(1, 0, 0.95), "above_max_reward"),
        ("reward_threshold", 0.9, row(0, 0, 0.9), row(1, 0, 0.85), "below_threshold"),
        ("where", "turns <= 3", calling(0, 2), calling(1, 3), "where"),
        ("agents", ["a"], row(0, 0), row(1, 0, agent_ref={"name": "b"}), "other_agent"),
        ("agents", ["a"], row(0, 0), row(1, 0, agent_ref=None), "other_agent"),
        ("exclude_agents", ["b"], row(0, 0, agent_ref=None), row(1, 0, agent_ref={"name": "b"}), "other_agent"),
        (
            "environments",
            ["e", "f"],
            row(0, 0, _ng_environment_server="e"),
            row(1, 0, _ng_environment_server="g"),
            "other_environment",
        ),
        ("exclude_environments", ["g"], row(0, 0), row(1, 0, _ng_environment_server="g"), "other_environment"),
        ("max_repetition", 0.5, row(0, 0, text=LOREM), row(1, 0, text=f"{LOREM} " * 5), "repetitive"),
    ],
)
def test_one_option_at_its_boundary(
    tmp_path: Path, setting: str, bound: Any, kept: dict[str, Any], dropped: dict[str, Any], reason: str
) -> None:
    extra = row(2, 0, agent_ref={"name": "a"}, _ng_environment_server="f") | {"reward": 0.9}
    path = write(tmp_path / "r.jsonl", kept, dropped, extra)
    if setting == "where":
        assert outcomes(run(path))[:2] == ["train", "train"]
    assert outcomes(run(path, **{setting: bound}))[:2] == ["train", reason]


def test_the_first_reason_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(0, 0), calling(1, 3) | {"reward": 0.0})
    given = {"max_turns": 1, "max_tool_calls": 1, "where": "false or reward = 1"}
    assert outcomes(run(path, **given))[1] == "too_many_turns"
    assert outcomes(run(path, **given | {"max_turns": None}))[1] == "too_many_tool_calls"
    assert outcomes(run(path, where=given["where"]))[1] == "where"
    assert outcomes(run(path))[1] == "below_threshold"


def test_the_threshold_is_that_of_the_agents_asked_for(tmp_path: Path) -> None:
    wild = [row(i, 0, -100.0 * i, agent_ref={"name": "wild"}) for i in range(3)]
    path = write(tmp_path / "r.jsonl", row(10, 0, 1.0), row(11, 0, 0.0), *wild)
    with pytest.raises(UserError, match="agent wild: rewards reach from -200") as caught:
        run(path)
    assert "--reward-threshold" in str(caught.value.remedy) and "--exclude-agents wild" in str(caught.value.remedy)
    assert run(path, agents=["a"]).threshold == run(path, exclude_agents=["wild"]).threshold == 1.0


def test_the_threshold_is_that_of_the_rows_left(tmp_path: Path) -> None:
    wild = [row(i, 0, -100.0 * i, _ng_environment_server="wild") for i in range(3)]
    path = write(tmp_path / "r.jsonl", *wild, row(10, 0, 1.0), row(11, 0, 0.0), row(12, 0, 0.5, text="long enough"))
    result = run(path, where="environment is null", max_completion_chars=8)
    assert (result.threshold, result.train) == (1.0, 1)
    assert run(path, where="environment is null").threshold == 0.8
    assert run(path, environments=["wild"], reward_threshold=-100.0).dropped["other_environment"] == 3


def test_each_environment_or_agent_has_a_threshold_of_its_own_where_all_together_have_none(tmp_path: Path) -> None:
    first = [row(i, k, float(k % 2), _ng_environment_server="e") for i in range(2) for k in range(3)]
    second = [row(i, k, [-5.0, 7.0][k % 2]) for i in range(10, 12) for k in range(3)]
    path = write(tmp_path / "r.jsonl", *first, *second, row(20, 0, None, agent_ref=None))
    result = run(path)
    assert result.threshold is None and result.thresholds == {"environment e": 1.0, "agent a": 7.0}
    assert outcomes(result) == ["below_threshold", "train", "below_threshold"] * 4 + ["reward_missing"]
    extra = json.loads((result.path / "manifest.json").read_text())["extra"]
    assert extra["reward_threshold"] is None and extra["reward_thresholds"] == result.thresholds
    assert "environment e 1 (rewards are binary" in result.threshold_why and "agent a 7" in result.threshold_why
    assert run(path, pass_rate="0.3-0.4").train == 4
    assert run(path, pass_rate="0.3-0.4", reward_threshold=1.0).train == 4
    with pytest.raises(UserError, match="pass_rate"):
        run(path, pass_rate="0.4-1")
    preview = preview_filter([path], tmp_path, FilterSettings(validation=0))
    assert (preview.threshold, preview.thresholds, preview.funnel[-1].left) == (None, result.thresholds, 4)
    assert not preview.stops


def test_a_rule_in_one_environment_is_not_enough(tmp_path: Path) -> None:
    wild = [row(i, 0, 3.0 * i, _ng_environment_server="wild; one") for i in range(3)]
    path = write(tmp_path / "r.jsonl", row(10, 0, 1.0), row(11, 0, 0.0), *wild)
    with pytest.raises(UserError, match="environment wild; one: rewards reach from 0 to 6") as caught:
        run(path)
    assert "leave it out with --exclude-environments 'wild; one'" in str(caught.value.remedy)


@pytest.mark.parametrize("rewards", [[0.0, 0.3, 0.9], [1.0, 0.0]])
def test_a_highest_reward_below_the_default_threshold_is_a_contradiction(tmp_path: Path, rewards: list[float]) -> None:
    path = write(tmp_path / "r.jsonl", *[row(i, 0, reward) for i, reward in enumerate(rewards)])
    with pytest.raises(UserError, match=r"--max-reward 0\.5 lies below the threshold") as caught:
        run(path, max_reward=0.5)
    assert "--reward-threshold of 0.5 or less" in str(caught.value.remedy)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *many())
    write_table([path], tmp_path / "t.parquet")
    with pytest.raises(UserError, match="--cap-per-task 2 has no effect"):
        run(path, cap_per_task=2, balance="none")
    with pytest.raises(UserError, match="--max-line-bytes 900 has no effect"):
        run(tmp_path / "t.parquet", max_line_bytes=900)
    assert run(tmp_path / "t.parquet", balance="none").train and run(path, max_line_bytes=900, cap_per_task=2).train


def test_an_unknown_name_is_an_error_with_those_that_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(0, 0), row(1, 0, agent_ref={"name": "b"}))
    for setting in ("agents", "exclude_agents"):
        with pytest.raises(UserError, match="agent 'c'") as caught:
            run(path, **{setting: ["a", "c"]})
        assert caught.value.remedy == "agents: a, b"
    with pytest.raises(UserError, match="environment 'e'") as caught:
        run(path, environments=["e"])
    assert "name no environment" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("turns <= 1 and not truncated and agent = 'a'", [True, True, False]),
        ("output_tokens > 5", [True, False, False]),  # null is false
        ("not (output_tokens > 5)", [False, False, False]),
        ("agent in ('it''s', 'b')", [False, False, True]),
        ("agent = 'select * from x' or agent = 'b -- not a comment'", [False, False, False]),
        ("array_contains(tools, 'f') or agent like 'b%'", [False, False, True]),
        ('"reward_part one" > 0.5', [True, False, False]),
        ("1 = 1", [True, True, True]),
        ("agent <> 'b' or agent is null", [True, True, False]),
        ("reward = max(reward)", [True, True, True]),
    ],
)
def test_where_holds(tmp_path: Path, condition: str, holds: list[bool]) -> None:
    first = row(0, 0, reward_components={"part one": 1.0})
    first["response"]["usage"] = {"output_tokens": 6, "input_tokens": 1}
    path = write(tmp_path / "r.jsonl", first, row(1, 0), row(2, 0, agent_ref={"name": "b"}))
    if any(holds):
        assert outcomes(run(path, where=condition)) == ["train" if held else "where" for held in holds]
    else:
        with pytest.raises(UserError, match="3  where"):
            run(path, where=condition)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("turn < 3", "no column 'turn'; did you mean 'turns'"),
        ("turns <", "parse"),
        ("turns", "not true or false but Int64"),
        ("turns, reward", "','"),
        ("turns = 'a'", "string"),
        ("agent ~ '('", "regex"),
        ("*", ""),
        ("turns = 1; select 1", "';'"),
        ("unnest(tools) = 'f'", "length"),
        ("turns in (select a from read_parquet('{0}'))", "'select'"),
        ("exists (from read_parquet('{0}'))", "'from'"),
        ("turns in (FROM read_csv('{0}'))", "'FROM'"),
        ("agent is distinct from 'x'", "right side"),
        ("turns Is Not  Distinct FROM 1 and tool_calls > 0", "right side"),
        ("turns = any(values (1))", "'values'"),
        ("turns in (table x)", "'table'"),
        ("read_parquet('{0}') is not null", "unsupported function"),
        ("scan_csv('{0}') is not null", "unsupported function"),
        ("/* ' */ turns in (select a from read_parquet('{0}')) /* ' */", "'/*'"),
        ("turns > 0 -- ' \n and turns in (select 1) -- '", "'--'"),
        ("agent = $$ ' $$ and turns in (select 1) and agent = $$ ' $$", "'$'"),
        ("agent = E'\\'' and turns in (select 1) and agent = ''", "'"),
        ("agent = `'` and turns in (select 1) and agent = `'`", "'`'"),
        ("turns = $1", "'$'"),
    ],
)
def test_where_is_one_expression_and_opens_nothing(tmp_path: Path, condition: str, message: str) -> None:
    other = tmp_path / "other.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(other)
    two = calling(0, 2)
    two["response"]["output"][2]["name"] = "g"  # of a list of two, unnesting makes two rows
    path = write(tmp_path / "r.jsonl", two, row(1, 0))
    with pytest.raises(UserError) as caught:
        run(path, keep_context=True, where=condition.format(other))
    assert "--where" in caught.value.message and message in caught.value.message
    assert "for example --where" in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


def tasks_by_rate(tmp_path: Path) -> Path:
    """Task n of 0 to 4 is solved by n of its four rollouts."""
    rows = [row(task, i, float(i < task)) for task in range(5) for i in range(4)]
    return write(tmp_path / "r.jsonl", *rows)


def kept_tasks(result: FilterResult) -> dict[int, int]:
    table = pl.read_parquet(result.path / "table.parquet").filter(split="train")
    return dict(sorted(Counter(table["task_index"].to_list()).items()))


@pytest.mark.parametrize(
    ("band", "kept"),
    [
        ("0.25-0.75", {1: 1, 2: 2, 3: 3}),
        ("0.26,0.74", {2: 2}),
        ([0, 1], {1: 1, 2: 2, 3: 3, 4: 4}),
        ("1-1", {4: 4}),
    ],
)
def test_pass_rate_band(tmp_path: Path, band: Any, kept: dict[int, int]) -> None:
    result = run(tasks_by_rate(tmp_path), pass_rate=band)
    assert kept_tasks(result) == kept
    assert result.dropped["below_threshold"] == 10


def test_pass_rate_counts_valid_rollouts_only(tmp_path: Path) -> None:
    rows = [row(0, 0), row(0, 1, 0.0), row(0, 2, 0.0, mask_sample=True), row(0, 3, None), row(0, 4, float("inf"))]
    undeclared = {"output": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}]}
    path = write(tmp_path / "r.jsonl", *rows, row(0, 5, 0.0, response=undeclared))
    assert run(path, pass_rate="0.5-0.5").train == 1
    assert run(path, pass_rate="0.3-0.4", keep_context=True).train == 1
    with pytest.raises(UserError):
        run(path, pass_rate="0.5-0.5", keep_context=True)


def test_rollouts_of_one_index_that_were_asked_different_things_have_a_rate_each(tmp_path: Path) -> None:
    asked = [{"input": "one"}, {"input": "one"}, {"input": "two"}, {"input": "two"}]
    rows = [row(0, i, float(i != 3), responses_create_params=params) for i, params in enumerate(asked)]
    result = run(write(tmp_path / "r.jsonl", *rows), pass_rate="0.5-0.5")
    assert outcomes(result) == ["pass_rate", "pass_rate", "train", "below_threshold"]


@pytest.mark.parametrize("bad", ["0.9-0.1", "much", "0-2", [0.1]])
def test_a_bad_band_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="pass_rate"):
        FilterSettings(pass_rate=bad)


def test_balance(tmp_path: Path) -> None:
    rows = [row(task, i, float(i < good)) for task, good in enumerate([8, 6, 4, 2]) for i in range(8)]
    path = write(tmp_path / "r.jsonl", *rows)
    assert kept_tasks(run(path, balance="none")) == {0: 8, 1: 6, 2: 4, 3: 2}
    assert kept_tasks(run(path, cap_per_task=3)) == {0: 3, 1: 3, 2: 3, 3: 2}
    # 1 - pass rate is 0, 1/4, 1/2, 3/4; the hardest has a cap of 6, the others in proportion.
    result = run(path, balance="prop2diff", cap_per_task=6)
    assert kept_tasks(result) == {0: 1, 1: 2, 2: 4, 3: 2}
    assert result.dropped["over_cap"] == 7 + 4
    always = write(tmp_path / "always.jsonl", *[row(task, i) for task in range(2) for i in range(3)])
    assert kept_tasks(run(always, balance="prop2diff", cap_per_task=2)) == {0: 2, 1: 2}


def test_the_cap_counts_prompts_of_one_input_row_as_one_task(tmp_path: Path) -> None:
    rows = [row(0, i, responses_create_params={"input": f"question 0, asked at {i}"}) for i in range(6)]
    path = write(tmp_path / "r.jsonl", *rows, row(1, 0))
    assert run(path, cap_per_task=4).train == 7
    write(tmp_path / "r_materialized_inputs.jsonl", *asked(2, 6))
    result = run(path, cap_per_task=4)
    assert (result.train, result.dropped) == (5, {"over_cap": 2})


def test_dedup(tmp_path: Path) -> None:
    near = LOREM.replace("river bank", "river shore")
    texts = [LOREM, LOREM, near, "something else entirely"]
    rows = [row(0, i, text=text) for i, text in enumerate(texts)] + [row(1, 0, text=LOREM)]
    path = write(tmp_path / "r.jsonl", *rows)
    assert run(path, dedup="none").train == 5
    assert run(path).dropped == {"duplicate_completion": 1}
    result = run(path, dedup="near")
    assert result.dropped == {"duplicate_completion": 1, "near_duplicate": 1}
    assert outcomes(result)[3:] == ["train", "train"]


def test_near_duplicates_keep_the_better_one_and_free_its_place(tmp_path: Path) -> None:
    near = LOREM.replace("river bank", "river shore")
    rows = [row(0, 0, 0.9, near), row(0, 1, 1.0, LOREM), row(0, 2, 0.8, "another answer")]
    result = run(write(tmp_path / "r.jsonl", *rows), dedup="near", cap_per_task=2)
    assert outcomes(result) == ["near_duplicate", "train", "train"]


def test_benchmark(tmp_path: Path) -> None:
    asked = {"responses_create_params": {"input": LOREM}}
    path = write(tmp_path / "r.jsonl", row(0, 0), row(1, 0) | asked, row(1, 1, 0.0) | asked, row(2, 0))
    held = write(tmp_path / "bench.jsonl", {"question": "unrelated words here"}, {"question": LOREM})
    result = run(path, benchmark=[held])
    assert outcomes(result) == ["train", "contaminated", "contaminated", "train"]
    assert result.contaminated_tasks == 1
    found = [json.loads(line) for line in (result.path / "contaminated.jsonl").open()]
    assert [(item["line"], item["benchmark"]) for item in found] == [(2, f"{held}:2"), (3, f"{held}:2")]
    assert found[0].keys() == {"row_id", "file", "line", "task_key", "by", "benchmark", "share"}
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["extra"]["contaminated_tasks"] == 1
    assert str(held) in [item["path"] for item in manifest["inputs"]]
    assert not (run(path).path / "contaminated.jsonl").exists()


def many(tasks: int = 30) -> list[dict[str, Any]]:
    return [row(task, repeat, float((task + repeat) % 3 > 0)) for task in range(tasks) for repeat in range(3)]


def asked(tasks: int, repeats: int = 3) -> list[dict[str, Any]]:
    rows = [row(i, repeat, answer=i) for i in range(tasks) for repeat in range(repeats)]
    return [{k: v for k, v in made.items() if k != "response"} for made in rows]


def test_the_split_is_the_same_whatever_else_is_filtered(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *many())
    sides: dict[str, str] = {}
    for options in (
        {"balance": "none"},
        {"cap_per_task": 1},
        {"where": "task_index % 2 = 0"},
        {"pass_rate": "0.5-0.9", "dedup": "none"},
        {"reward_threshold": 0.0, "max_reward": 0.5},
        {"max_completion_chars": 8, "balance": "prop2diff"},
    ):
        result = run(path, validation=0.3, **options)
        table = pl.read_parquet(result.path / "table.parquet").filter(pl.col("split") != "dropped")
        for task, side in table.select("task_key", "split").iter_rows():
            assert sides.setdefault(task, side) == side
    assert set(sides.values()) == {"train", "validation"}


def test_cluster_file(tmp_path: Path) -> None:
    rows = many(40)
    path = write(tmp_path / "r.jsonl", *rows)
    write(tmp_path / "r_materialized_inputs.jsonl", *asked(60))
    keys = [input_key(item) for item in asked(60, 1)]
    # Tasks 0 to 35 in six clusters, further ones on their own; 40 to 50 have no rollout.
    named = [{"input_key": key, "cluster": i % 6} for i, key in enumerate(keys[:50]) if i < 36 or i >= 40]
    clusters = write(tmp_path / "map.jsonl", *named)
    result = run(path, cluster=str(clusters), validation=0.4, dedup="none")
    table = pl.read_parquet(result.path / "table.parquet").filter(pl.col("split") != "dropped")
    sides: dict[int, set[str]] = {}
    for index, split in table.filter(pl.col("task_index") < 36).select("task_index", "split").iter_rows():
        sides.setdefault(index % 6, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert result.tasks_without_cluster == 4
    assert sum(result.clusters.values()) == 6 + 4
    held = {json.loads(line)["answer"] for line in (result.path / "heldout_inputs.jsonl").open()}
    out = {number for number, side in sides.items() if side == {"validation"}}
    assert out and {i for i in range(40, 50) if i % 6 in out} == {i for i in held if 40 <= i < 50}
    tasks = dict(pl.read_parquet(result.path / "table.parquet").select("task_index", "task_key").iter_rows())
    write(clusters, *({"task_key": tasks[i], "cluster": i % 6} for i in range(40)))
    again = run(path, cluster=str(clusters), validation=0.4)
    assert again.tasks_without_cluster == 0 and sum(again.clusters.values()) == 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "map.jsonl:1"),
        (['{"task_key": "x", "cluster": 1}', "garbage"], "map.jsonl:2: not JSON"),
        (['{"task_key": "x"}'], "map.jsonl:1: no task with a cluster"),
        (['{"task_key": 3, "cluster": 1}'], "map.jsonl:1: no task with a cluster"),
        (['{"task_key": "x", "cluster": 1}', '{"task_key": "x", "cluster": 2}'], "map.jsonl:2: the task x"),
        (['{"task_key": "x", "cluster": 1}'], "names none of the tasks"),
        ([], "names none of the tasks"),
    ],
)
def test_a_bad_cluster_file_names_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path / "r.jsonl", *many(3))
    with pytest.raises(UserError, match=message):
        run(path, cluster=str(write(tmp_path / "map.jsonl", *lines)))
    with pytest.raises(UserError, match="No such file"):
        run(path, cluster=str(tmp_path / "none.jsonl"))


def two_files(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    one = write(folder / "one.jsonl", *many(), "garbage", row(0, 9, None))
    one.write_bytes(one.read_bytes().replace(b"garbage\n", b"garbage\r\n\n   \n"))
    two = write(folder / "two.jsonl", *[row(i, 0, text="other") for i in range(5)], row(3, 1, text="x" * (_SPAN + 9)))
    two.write_bytes(two.read_bytes().rstrip(b"\n"))
    write(folder / "one_materialized_inputs.jsonl", *asked(40))
    return [one, two]


def test_a_table_gives_what_its_files_give(tmp_path: Path) -> None:
    files = two_files(tmp_path)
    write_table(files, tmp_path / "t.parquet")
    given = FilterSettings(validation=0.3, dedup="near", max_repetition=0.9, where="completion_chars > 1")
    first = filter_rollouts(files, tmp_path / "a", given)
    second = filter_rollouts([tmp_path / "t.parquet"], tmp_path / "b", given)
    third = filter_rollouts([tmp_path / "a" / "table.parquet"], tmp_path / "c", given)
    assert_whole(first.path, *files)
    assert written(first.path) == written(second.path) == written(third.path)
    assert "heldout_inputs.jsonl" in written(first.path) and first.validation
    tables = [pl.read_parquet(tmp_path / name / "table.parquet") for name in "abc"]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    inputs = json.loads((tmp_path / "b" / "manifest.json").read_text())["inputs"]
    names = [Path(item["path"]).name for item in inputs]
    assert names == ["t.parquet", "one.jsonl", "two.jsonl", "one_materialized_inputs.jsonl"]


def test_no_rollout_file_is_parsed_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = two_files(tmp_path)
    write_table(files, tmp_path / "t.parquet")
    monkeypatch.setattr("gymtrl.rollouts.reader.judge", None)
    filter_rollouts([tmp_path / "t.parquet"], tmp_path / "b", FilterSettings())


def test_a_table_in_another_order_is_followed(tmp_path: Path) -> None:
    files = two_files(tmp_path)
    write_table(files, tmp_path / "t.parquet")
    pl.read_parquet(tmp_path / "t.parquet").sample(fraction=1, shuffle=True, seed=3).write_parquet(
        tmp_path / "s.parquet"
    )
    result = filter_rollouts([tmp_path / "s.parquet"], tmp_path / "b", FilterSettings())
    assert_whole(result.path, *files)


@pytest.mark.parametrize("change", ["flip", "flip in a long line", "longer", "gone", "negative", "cut"])
def test_a_file_that_has_changed_is_refused_by_its_line(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "r.jsonl", *many(5), row(5, 0, text="x" * _SPAN))
    table = tmp_path / "t.parquet"
    write_table([path], table)
    data, state = path.read_bytes(), path.stat()
    if change == "flip in a long line":
        path.write_bytes(data.replace(b"xxxx", b"yyyy", 1))
    elif change == "flip":
        at = data.index(b"question 2")
        path.write_bytes(data[:at] + b"Q" + data[at + 1 :])
    elif change == "longer":
        path.write_bytes(b"{}\n" + data)
    elif change == "cut":
        path.write_bytes(data[:-5])
    elif change == "negative":
        pl.read_parquet(table).with_columns(offset=-pl.col("offset")).write_parquet(table)
    else:
        path.unlink()
    if change.startswith("flip"):  # what neither size nor time tells
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    where = {
        "flip": "r.jsonl:7",
        "longer": "r.jsonl has changed",
        "cut": "r.jsonl has changed",
        "flip in a long line": "r.jsonl:16",
        "negative": "r.jsonl:2",
        "gone": "r.jsonl",
    }
    with pytest.raises(UserError, match=where[change]) as caught:
        run(table)
    assert change == "gone" or "make the table again" in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *many(5))
    table = tmp_path / "t.parquet"
    write_table([path], table)
    with pytest.raises(UserError, match="stands alone"):
        filter_rollouts([table, path], tmp_path / "out", FilterSettings())
    with pytest.raises(UserError, match="was made with no cluster"):
        run(table, cluster="meta")
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"bad\.parquet is no Parquet file"):
        run(tmp_path / "bad.parquet")
    pl.read_parquet(table).with_columns(offset=None).cast({"offset": pl.Int64}).write_parquet(tmp_path / "null.parquet")
    with pytest.raises(UserError, match="rows without a place"):
        run(tmp_path / "null.parquet")
    pl.read_parquet(table).drop("turns", "fault").write_parquet(tmp_path / "old.parquet")
    with pytest.raises(UserError, match="turns, fault") as caught:
        run(tmp_path / "old.parquet")
    assert "gymtrl inspect" in str(caught.value.remedy)


def test_unseen_tasks_are_not_held_out_where_the_tables_clusters_are_the_users(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *[row(i, 0, meta=i % 4) for i in range(20)])
    write(tmp_path / "r_materialized_inputs.jsonl", *[item | {"meta": i % 4} for i, item in enumerate(asked(80, 1))])
    write_table([path], tmp_path / "t.parquet", cluster="meta")
    from_files = run(path, cluster="meta", validation=0.5)
    from_table = run(tmp_path / "t.parquet", validation=0.5)
    assert from_files.train == from_table.train
    seen = from_table.tasks["validation"]
    assert (from_files.heldout_inputs, from_table.heldout_inputs) == (4 * seen, seen)


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "reward_threshold": st.sampled_from([0.0, 0.5, 1.0]),
    "max_reward": st.sampled_from([1.0, 2.0]),
    "pass_rate": st.sampled_from(["0-0.5", "0.1-0.9", "0-1"]),
    "cap_per_task": st.integers(1, 5),
    "balance": st.sampled_from(["none", "uniform", "prop2diff"]),
    "dedup": st.sampled_from(["none", "exact", "near"]),
    "max_repetition": st.floats(0, 1),
    "where": st.sampled_from(["turns < 2", "not truncated", "reward >= 0 or agent = 'a'"]),
    "agents": st.sampled_from([["a"], ["a", "b"]]),
    "exclude_agents": st.sampled_from([["b"]]),
    "max_turns": st.integers(1, 3),
    "max_tool_calls": st.integers(0, 2),
    "require_tool_use": st.booleans(),
    "max_prompt_chars": st.integers(0, 12),
    "min_completion_chars": st.integers(0, 12),
    "max_completion_chars": st.integers(0, 40),
    "validation": st.sampled_from([0.0, 0.2, 0.6]),
    "keep_context": st.booleans(),
    "keep_truncated": st.booleans(),
    "seed": st.integers(0, 3),
}
ROWS = st.one_of(
    st.builds(
        row,
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([0.0, 0.5, 1.0, None, float("nan")]),
        st.sampled_from(["yes", "no", LOREM, "<think>", "é"]),
        agent_ref=st.sampled_from([{"name": "a"}, {"name": "b"}]),
    ),
    st.builds(calling, st.integers(0, 5), st.integers(0, 3)),
    st.sampled_from(["garbage", "[]", "\r", "  ", '{"question": "?"}']),
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROWS, min_size=5, max_size=25), given=st.fixed_dictionaries({}, optional=OPTIONS))
def test_nothing_is_lost_whatever_the_settings(rows: list[Any], given: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        fixed = [row(6, 0), row(7, 0, agent_ref={"name": "b"})]
        path = write(folder / "r.jsonl", *fixed, *rows)
        try:
            result = run(path, **given)
        except UserError as error:
            assert error.remedy
            assert [item.name for item in folder.iterdir()] == ["r.jsonl"]
            return
        assert_whole(result.path, path)
        assert result.train + result.validation + sum(result.dropped.values()) == len(outcomes(result))
        table = folder / "t.parquet"
        write_table([path], table)
        again = filter_rollouts([table], folder / "again", FilterSettings(**{"validation": 0} | given))
        assert written(again.path) == written(result.path)
        preview = preview_filter([table], folder, FilterSettings(**given))
        assert preview.funnel[-1].left == result.train + result.validation
    finally:
        shutil.rmtree(folder)


def test_the_funnel_and_the_sweep_say_what_the_filter_does(tmp_path: Path) -> None:
    rows = [row(task, i, 0.1 * i, text=f"text {i} {'x' * task}") for task in range(6) for i in range(11)]
    rows[10]["response"]["usage"] = {"output_tokens": 1000, "input_tokens": 3}
    path = write(tmp_path / "r.jsonl", *rows, "garbage")
    given = {"max_completion_chars": 11, "cap_per_task": 3, "where": "repeat <> 5", "reward_threshold": 0.75}
    preview = preview_filter([path], tmp_path, FilterSettings(**given))
    (tmp_path / "table.parquet").unlink()
    result = run(path, **given)
    assert preview.rows == 67 and (preview.threshold, preview.threshold_why) == (result.threshold, result.threshold_why)
    found = {step.rule: step.dropped for step in preview.funnel if step.dropped}
    assert found == {name.partition(":")[0]: count for name, count in result.dropped.items()}
    assert preview.funnel[0].left == 66 and preview.funnel[-1].left == result.train
    order = [rule.name for rule in RULES]
    assert [step.rule for step in preview.funnel] == sorted((s.rule for s in preview.funnel), key=order.index)
    assert {"where", "completion_too_long"} <= found.keys() and "too_many_turns" not in order[: len(found)]
    assert [kept.chosen for kept in preview.sweep].count(True) == 1
    assert len(preview.sweep) == 11  # ten rewards that are left, and the chosen one
    for kept in preview.sweep:
        chosen = run(path, **given | {"reward_threshold": kept.threshold})
        table = pl.read_parquet(chosen.path / "table.parquet").filter(split="train")
        tokens = table.select(pl.coalesce("output_tokens", pl.col("completion_chars") // 4).sum()).item()
        assert (kept.rows, kept.tasks, kept.tokens) == (chosen.train, table["task_key"].n_unique(), tokens)
        assert kept.estimated == table["output_tokens"].null_count()


def test_without_a_rule_for_the_threshold_the_sweep_helps_to_choose(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *[row(i, 0, float(i)) for i in range(40)])
    preview = preview_filter([path], tmp_path, FilterSettings())
    assert preview.threshold is None and "from 0 to 39" in preview.threshold_why
    assert [step.rule for step in preview.funnel][-1] == "unbalanced_think"
    assert [kept.threshold for kept in preview.sweep] == [0, 4, 8, 12, 16, 20, 23, 27, 31, 35, 39]
    assert [kept.rows for kept in preview.sweep] == [40 - int(kept.threshold) for kept in preview.sweep]
    assert not any(kept.chosen for kept in preview.sweep)
    assert preview.stops == preview.threshold_why and "--reward-threshold" in preview.remedy and preview.split == {}


@pytest.mark.parametrize("rows", [1, 40, 70])
def test_the_sweep_reads_each_rollout_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    made = [row(i % 2, i, 0.05 * (i % 20), text=f"{LOREM} {i // 3 if i % 2 else i * 7}") for i in range(2 * rows)]
    path = write(tmp_path / "r.jsonl", *made)
    write_table([path], tmp_path / "t.parquet")
    given = {"dedup": "near", "max_repetition": 0.9, "balance": "none", "reward_threshold": 0.5}
    near = []

    def counting(origin: Any) -> Any:
        near.append(origin.line)
        return read_rollout(origin)

    monkeypatch.setattr("gymtrl.selection.measures.read_rollout", counting)
    preview = preview_filter([tmp_path / "t.parquet"], tmp_path, FilterSettings(**given))
    # Once for each of the two; again only where so few are left that all of them are compared.
    assert len(near) <= 2 * 2 * rows + (64 if rows > 64 else 0) * 2
    for kept in preview.sweep:
        try:
            assert run(path, **given | {"reward_threshold": kept.threshold}).train == kept.rows
        except UserError:
            assert kept.rows == 0


def test_the_dry_run_says_where_the_filter_would_stop(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", *[row(0, i) for i in range(3)])
    shown = gymtrl("filter", path, "--dry-run", cwd=tmp_path)
    ran = gymtrl("filter", path, "-o", "out", cwd=tmp_path)
    assert (shown.returncode, ran.returncode) == (0, 2)
    for text in ("all rollouts belong to one task or cluster", "pass --validation 0"):
        assert text in shown.stdout and text in ran.stderr


def test_the_dry_run_and_the_run_show_the_same_split(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", *many())
    preview = preview_filter([path], tmp_path, FilterSettings(validation=0.3))
    (tmp_path / "table.parquet").unlink()
    shown = gymtrl("filter", path, "--split", "validation=0.3", "--dry-run", cwd=tmp_path)
    ran = gymtrl("filter", path, "--split", "validation=0.3", "-o", "out", cwd=tmp_path)
    table = pl.read_parquet(tmp_path / "out" / "table.parquet")
    sides = {side: table.filter(split=side) for side in ("train", "validation")}
    assert {name: (side.rows, side.tasks) for name, side in preview.split.items()} == {
        name: (rows.height, rows["task_key"].n_unique()) for name, rows in sides.items()
    }
    counts = [f"{name} {side.rows} rows of {side.tasks} tasks" for name, side in preview.split.items()]
    assert ", ".join(counts) in shown.stdout and ", ".join(counts) in ran.stdout
    assert 4 <= preview.split["validation"].tasks <= 15
    assert "the reward is too low" in ran.stdout
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["validation"] == 0.3


def gymtrl(*arguments: str | Path, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gymtrl", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **more)


def test_dry_run_shows_the_funnel_and_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", *many())
    options = ("--agents", "a", "--agents", "b", "--pass-rate", "0.5-0.9", "--cap-per-task", "1", "--dry-run")
    write(tmp_path / "rollouts.jsonl", *many(), row(50, 0, agent_ref={"name": "b"}), "garbage")
    shown = gymtrl("filter", path, *options, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for words in ("flag --pass-rate", "below_threshold", "over_cap", "threshold", "* 1", "nothing was written"):
        assert words in shown.stdout
    content = json.loads(gymtrl("filter", "-", *options, "--json", cwd=tmp_path, input=path.read_text()).stdout)
    assert content["settings"]["agents"] == {"value": ["a", "b"], "origin": "flag --agents"}
    assert content["settings"]["pass_rate"]["value"] == [0.5, 0.9]
    assert content["rows"] == 92 and content["funnel"][-1]["rule"] == "over_cap"
    assert [kept["chosen"] for kept in content["sweep"]] == [False, True]
    assert [item.name for item in tmp_path.iterdir()] == ["rollouts.jsonl"]
    assert gymtrl("filter", path, *options[:-1], "-o", "out", cwd=tmp_path).returncode == 0
    written_lines = (tmp_path / "out" / "train.jsonl").read_bytes() + (
        tmp_path / "out" / "validation.jsonl"
    ).read_bytes()
    assert written_lines.count(b"\n") == content["funnel"][-1]["left"]


def test_a_table_on_the_command_line_is_up_to_date_until_its_files_change(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", *many())
    assert gymtrl("inspect", path, "--table", "t.parquet", cwd=tmp_path).returncode == 0
    assert gymtrl("filter", "t.parquet", "-o", "out", cwd=tmp_path).returncode == 0
    assert "up to date" in gymtrl("filter", "t.parquet", "-o", "out", cwd=tmp_path).stderr
    path.write_bytes(path.read_bytes().replace(b"question 3", b"Question 3"))
    changed = gymtrl("filter", "t.parquet", "-o", "out", cwd=tmp_path)
    assert changed.returncode == 2 and "has changed since" in changed.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--split", "test=0.1", "--validation"),
        ("--pass-rate", "0.9-0.1", "the lower end comes first"),
        ("--pass-rate", "half", "two numbers, such as 0.1-0.9"),
        ("--max-reward", "-1", "no reward can pass"),
        ("--benchmark", "none.jsonl", "none.jsonl"),
        ("--where", "turn < 3", "did you mean 'turns'"),
        ("--balance", "fair", "fair"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, option: str, value: str, message: str) -> None:
    path = write(tmp_path / "rollouts.jsonl", *many())
    done = gymtrl("filter", path, "--reward-threshold", "1", option, value, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["rollouts.jsonl"]
