from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Line
from rows import row, write_rows

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


USER = {"role": "user", "content": "a"}


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}} | more
    return {"role": "assistant", "content": None, "reasoning_content": "Add them.", "tool_calls": [call]}


def only(tmp_path: Path, *turns: Any, **more: Any) -> Line:
    (line,) = read_lines([write_rows(tmp_path / "chats.jsonl", [{"messages": list(turns), **more}])])
    return line


def test_a_chat_row_becomes_the_record_that_gym_s_row_becomes(tmp_path: Path) -> None:
    ask, say = {"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": "42"}
    chat = only(tmp_path, ask, say, reward=1, agent_ref={"name": "agent"}, model="m").rollout
    (line,) = read_lines([write_rows(tmp_path / "rollouts.jsonl", [row("6 x 7?", "42", 1.0)])])
    assert chat is not None and line.rollout is not None
    assert (chat.prompt, chat.completion, chat.reward) == (line.rollout.prompt, line.rollout.completion, 1.0)
    assert chat.task_key == line.rollout.task_key


@pytest.mark.parametrize("arguments", ['{"a": 6, "b": 7}', {"a": 6, "b": 7}])
def test_calls_with_and_without_ids(tmp_path: Path, arguments: Any) -> None:
    ask, end = {"role": "user", "content": "6 + 7?"}, {"role": "assistant", "content": "13"}
    with_ids = [called(arguments, id="x"), {"role": "tool", "tool_call_id": "x", "content": "13"}]
    without = [called(arguments), {"role": "tool", "content": "13"}]
    for turns in (with_ids, without):
        line = only(tmp_path, ask, *turns, end, tools=[TOOL])
        assert (line.verdict, line.reason) == ("ok", "")
        assert line.rollout is not None
        first, answer, last = line.rollout.completion
        assert (first.reasoning_content, first.tool_calls[0].arguments) == ("Add them.", {"a": 6, "b": 7})
        assert (answer.role, answer.name, answer.content, last.content) == ("tool", "add", "13", "13")
        assert answer.tool_call_id == first.tool_calls[0].id
        assert line.rollout.tools == (TOOL,)


def test_images_come_along(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    line = only(tmp_path, {"role": "user", "content": [image]}, {"role": "assistant", "content": "a dot"})
    assert line.rollout is not None and line.rollout.prompt[0].images == ("data:image/png;base64,AA==",)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "user", "content": "a"}], "no_assistant_turn"),
        ([{"role": "assistant", "content": "a"}], "no_prompt"),
        ([USER, called("{")], "bad_tool_arguments"),
        ([USER, called("{}"), {"role": "assistant", "content": "b"}], "missing_tool_output"),
        ([{"role": "critic", "content": "a"}], "no_prompt"),
        ([USER, {"role": "assistant", "content": ""}], "empty_assistant"),
        ([{"role": "user", "content": 7}, {"role": "assistant", "content": "a"}], "unsupported_content_part"),
        ([USER, {"role": "assistant", "content": "b", "tool_calls": ["x"]}], "unsupported_item_type:tool_call"),
        (["text"], "custom_record"),
        ([], "custom_record"),
    ],
)
def test_unsound_chats_are_refused_as_gym_s_rows_are(tmp_path: Path, turns: list[Any], reason: str) -> None:
    assert only(tmp_path, *turns).reason == reason


def test_a_rollout_that_also_has_messages_is_a_rollout(tmp_path: Path) -> None:
    both = row("6 x 7?", "42", 1.0, messages=[{"role": "user", "content": "other"}])
    (line,) = read_lines([write_rows(tmp_path / "rollouts.jsonl", [json.loads(json.dumps(both))])])
    assert line.rollout is not None and line.rollout.prompt[0].content == "6 x 7?"
