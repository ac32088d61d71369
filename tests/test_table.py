from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.table import SCHEMA, rollout_table


def row(task: int | None, repeat: int, question: str, **more: Any) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "four"}]}
    request = {"input": [{"role": "user", "content": question}], "tools": [{"type": "function", "name": "f"}]}
    indexes = {} if task is None else {"_ng_task_index": task, "_ng_rollout_index": repeat}
    return {"responses_create_params": request, "response": {"output": [said, call]}, "reward": 0.5} | indexes | more


def table(path: Path, *rows: Any) -> pl.DataFrame:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return rollout_table(read_lines([path]))


def test_one_row_a_line_with_a_stable_schema(tmp_path: Path) -> None:
    full = table(tmp_path / "a.jsonl", row(0, 0, "q?"), "garbage")
    rejects = table(tmp_path / "b.jsonl", "garbage")
    assert dict(full.schema) == dict(rejects.schema) == SCHEMA
    assert full["verdict"].to_list() == ["ok", "reject"]
    assert full["reason"].to_list() == ["", "malformed_json"]
    columns = ("reward", "turns", "tool_calls", "prompt_chars", "completion_chars", "repeat")
    assert full.select(columns).row(0) == (0.5, 1, 1, 2, 6, 0)
    assert full.select(columns).row(1) == (None,) * 6


def test_groups_by_file_agent_and_index_else_by_task(tmp_path: Path) -> None:
    rows = [row(0, 0, "a"), row(0, 1, "a"), row(1, 0, "a"), row(0, 0, "a", agent_ref={"name": "x"})]
    groups = table(tmp_path / "a.jsonl", *rows)["group"].to_list()
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3
    assert table(tmp_path / "b.jsonl", *rows)["group"][0] not in groups
    unnumbered = table(tmp_path / "c.jsonl", row(None, 0, "a"), row(None, 0, "a"), row(None, 0, "b"))["group"].to_list()
    assert unnumbered[0] == unnumbered[1] != unnumbered[2]


def test_rows_of_one_index_that_were_asked_different_things_are_no_group(tmp_path: Path) -> None:
    read = table(tmp_path / "a.jsonl", row(0, 0, "a"), row(0, 1, "b"), row(1, 0, "c"))
    assert read["group"].is_null().to_list() == [True, True, False]
    assert read["flags"].to_list() == [["prompt_differs"], ["prompt_differs"], []]


def test_shipped_blackjack_rows_differ_in_their_prompts(gym_site_packages: Path) -> None:
    path = gym_site_packages / "resources_servers/blackjack/data/example_rollouts.jsonl"
    assert rollout_table(read_lines([path]))["group"].null_count() == 5
