"""Prompts with the pass rate that was logged, and recorded groups with the log-probabilities that were."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gymtrl import FormatGrpoSettings, format_grpo
from rows import row, write_rows
from tool_rows import TOOL, cut, recorded, tool_row

COLLECTED = Path(__file__).parent / "data" / "reasoning-gym-8x.jsonl"


@pytest.fixture(scope="module")
def tokenizer(smollm2_tools_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_tools_dir)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(next((folder / "data").glob("train-*"))).to_pylist()
    return rows


def dropped(folder: Path) -> dict[int, tuple[str, str]]:
    rows = pq.read_table(folder / "dropped.parquet").to_pylist()
    return {entry["line"]: (entry["reason"], entry["detail"]) for entry in rows}


def collected() -> dict[int, dict[str, Any]]:
    return {number: json.loads(line) for number, line in enumerate(COLLECTED.read_text().splitlines(), 1)}


def test_prompts_of_the_collected_tasks(tmp_path: Path, smollm2_dir: Path) -> None:
    settings = FormatGrpoSettings(model=str(smollm2_dir), reward_threshold=1.0)
    rows = rows_of(format_grpo(COLLECTED, tmp_path / "out", settings).path)
    rollouts, tokenizer = collected(), AutoTokenizer.from_pretrained(smollm2_dir)
    rewards = defaultdict(list)
    for rollout in rollouts.values():
        rewards[rollout["_ng_task_index"]].append(rollout["reward"])
    rates = {task: sum(reward == 1.0 for reward in given) / 8 for task, given in rewards.items()}
    tasks = [rollouts[entry["line"]]["_ng_task_index"] for entry in rows]
    assert sorted(tasks) == sorted(task for task, rate in rates.items() if 0.1 <= rate <= 0.9)
    for task, entry in zip(tasks, rows, strict=True):
        assert (entry["pass_rate"], entry["rollouts"]) == (rates[task], 8)
        sent = rollouts[entry["line"]]["responses_create_params"]["input"]
        chat = [{"role": message["role"], "content": message["content"]} for message in sent]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert entry["prompt_ids"] == ids and json.loads(entry["record_json"])["prompt"] == chat


def test_pass_rates_count_what_was_measured_and_let_in_a_few_unsolved(
    tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = [
        tool_row(f"Weigh {task}.", [("it", "9 pounds")], f"a{repeat}", float(repeat < good), index=task, repeat=repeat)
        for task, good in enumerate((4, 1, 2, 0, 0, 3))
        for repeat in range(4)
    ]
    made.append(tool_row("Weigh 1.", [], "the scales broke", 0.0, index=1, repeat=4, mask_sample=True))
    source = write_rows(tmp_path / "rollouts.jsonl", made)
    settings = FormatGrpoSettings(model=str(smollm2_tools_dir), zero_share=0.25)
    result = format_grpo(source, tmp_path / "out", settings)
    rows = rows_of(result.path)
    assert [(entry["pass_rate"], entry["rollouts"]) for entry in rows if entry["pass_rate"]] == [
        *((0.25, 4), (0.5, 4), (0.75, 4))
    ]
    assert sorted(entry["pass_rate"] for entry in rows)[0] == 0.0 and len(rows) == 4
    chat = [{"role": "user", "content": "Weigh 1."}]
    tools = [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    sent = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True)["input_ids"]
    assert rows[0]["prompt_ids"] == sent
    reasons = {line: reason for line, (reason, _) in dropped(result.path).items()}
    assert [reasons[line] for line in (1, 6, 25)] == ["solved_too_often", "same_task", "masked"]
    assert not (result.path / "train_with_trl.py").exists()


def test_collected_groups_hold_what_was_recorded(tmp_path: Path, smollm2_dir: Path) -> None:
    settings = FormatGrpoSettings(model=str(smollm2_dir), kind="groups", group_size=6)
    result = format_grpo(COLLECTED, tmp_path / "out", settings)
    rollouts, groups = collected(), defaultdict(list)
    for entry in rows_of(result.path):
        groups[entry["group"]].append(entry["reward"])
        rollout = rollouts[entry["line"]]
        (item,) = rollout["response"]["output"]
        assert entry["reward"] == rollout["reward"]
        assert entry["prompt_ids"] == item["prompt_token_ids"]
        assert entry["completion_ids"] == item["generation_token_ids"]
        assert entry["log_probs"] == item["generation_log_probs"] and set(entry["completion_mask"]) == {1}
    assert len(groups) > 8 and result.facts["with_log_probs"] == 6 * len(groups)
    for rewards in groups.values():
        assert len(rewards) == 6 and len(set(rewards)) > 1


def test_what_was_cut_off_counts_in_its_group(tmp_path: Path, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    result = format_grpo(COLLECTED, tmp_path / "out", FormatGrpoSettings(model=str(smollm2_dir), kind="groups"))
    rollouts, groups = collected(), defaultdict(list)
    for entry in rows_of(result.path):
        groups[entry["group"]].append(entry["reward"])
        (item,) = rollouts[entry["line"]]["response"]["output"]
        assert entry["completion_ids"] == item["generation_token_ids"] and set(entry["completion_mask"]) == {1}
        is_cut = rollouts[entry["line"]]["response"]["incomplete_details"] is not None
        assert (entry["completion_ids"][-1] == tokenizer.eos_token_id) is not is_cut
    # Every task whose rewards differ, with all its rollouts.
    rewards = defaultdict(list)
    for rollout in rollouts.values():
        rewards[rollout["_ng_task_index"]].append(rollout["reward"])
    differing = sorted(sorted(given) for given in rewards.values() if len(set(given)) > 1)
    assert sorted(sorted(given) for given in groups.values()) == differing and len(differing) == 15
    assert result.facts["group_size"] == 8 and result.counts.dropped == {"no_variance": 8}


@pytest.mark.parametrize("ids", ["none", "never", "other"])
def test_what_was_cut_off_is_never_rendered(
    ids: str, tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = [tool_row(f"Weigh {i // 2}.", [], "heavy", float(i % 2), index=i // 2, repeat=i % 2) for i in range(4)]
    made[1] = cut(made[1] if ids == "none" else recorded(made[1], tokenizer))
    if ids == "other":
        made[1]["response"]["output"][0]["generation_token_ids"][0] = tokenizer.encode("light")[0]
    settings = FormatGrpoSettings(
        model=str(smollm2_tools_dir), kind="groups", use_recorded_ids="never" if ids == "never" else "auto"
    )
    result = format_grpo(write_rows(tmp_path / "rollouts.jsonl", made), tmp_path / "out", settings)
    assert [entry["line"] for entry in rows_of(result.path)] == [3, 4]
    assert {line: reason for line, (reason, _) in dropped(result.path).items()} == {1: "truncated", 2: "truncated"}


def test_log_probs_of_tool_loops_stand_at_their_tokens(
    tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    steps = [("stone", "SCALES-12"), ("feather", "SCALES-1")]
    made = [
        recorded(tool_row("Weigh.", steps, answer, reward, repeat=i), tokenizer)
        for i, (answer, reward) in enumerate((("heavy", 1.0), ("light", 0.0)))
    ]
    made.append(tool_row("Weigh.", steps[:1], "the scales broke", 0.0, repeat=2, mask_sample=True))
    source = write_rows(tmp_path / "rollouts.jsonl", made)
    settings = FormatGrpoSettings(model=str(smollm2_tools_dir), kind="groups")
    rows = rows_of(format_grpo(source, tmp_path / "out", settings).path)
    assert [entry["reward"] for entry in rows] == [1.0, 0.0, None]
    assert [entry["route"] == "recorded" for entry in rows] == [True, True, False]
    assert rows[2]["log_probs"] is None
    for entry, rollout in zip(rows[:2], made, strict=False):
        items = [item for item in rollout["response"]["output"] if "generation_token_ids" in item]
        marked = list(zip(entry["completion_ids"], entry["completion_mask"], entry["log_probs"], strict=True))
        assert [token for token, mark, _ in marked if mark] == [*chain(*(i["generation_token_ids"] for i in items))]
        assert [value for _, mark, value in marked if mark] == [*chain(*(i["generation_log_probs"] for i in items))]
        assert {value for _, mark, value in marked if not mark} == {0.0}
        assert "SCALES-12" in tokenizer.decode([token for token, mark, _ in marked if not mark])


def test_a_group_with_a_rollout_that_does_not_fit_is_no_group(tmp_path: Path, smollm2_dir: Path) -> None:
    made = [
        row(f"q{task}", answer, reward, index=task, repeat=repeat)
        for task in range(2)
        for repeat, (answer, reward) in enumerate((("right", 1.0), ("word " * (90 * task) + "wrong", 0.0)))
    ]
    source = write_rows(tmp_path / "rollouts.jsonl", made)
    settings = FormatGrpoSettings(model=str(smollm2_dir), kind="groups", max_length=64)
    result = format_grpo(source, tmp_path / "out", settings)
    assert [entry["line"] for entry in rows_of(result.path)] == [1, 2]
    (reason, other), (same, own) = (dropped(result.path)[line] for line in (3, 4))
    assert reason == same == "too_long" and own.endswith("tokens, 64 fit")
    assert other == f"another rollout of its group: {own}"
