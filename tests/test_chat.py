from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Line
from rows import row, write_rows

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


USER = {"role": "user", "content": "a"}
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "b"}
TOLD = {"role": "tool", "tool_call_id": "x", "content": "13"}


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
        ([USER, ASSISTANT | {"tool_calls": {"name": "add"}}], "unsupported_item_type:tool_call"),
        ([USER, ASSISTANT | {"tool_calls": ""}], "unsupported_item_type:tool_call"),
        ([USER, ASSISTANT | {"function_call": {"name": "add"}}], "unsupported_item_type:tool_call"),
        ([USER, ASSISTANT | {"content": None, "audio": {"id": "a"}}], "unsupported_modality_audio"),
        ([USER, ASSISTANT | {"refusal": "No."}], "refusal_part"),
        ([USER, ASSISTANT | {"content": None, "refusal": "No."}], "refusal_part"),
        ([USER, called("{}", id="x"), called("{}", id="x")], "duplicate_call_id"),
        ([USER, called("{}", id="x"), TOLD, TOLD, ASSISTANT], "duplicate_tool_output"),
        ([USER, called("{}", id="y"), TOLD, ASSISTANT], "orphan_tool_output"),
        ([USER, called("{}", id=7), TOLD, ASSISTANT], "missing_call_id"),
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


def test_empty_fields_that_chat_completions_write_are_no_fault(tmp_path: Path) -> None:
    empty = {"tool_calls": None, "function_call": None, "audio": None, "refusal": None}
    assert only(tmp_path, USER, ASSISTANT | empty).verdict == "ok"
    assert only(tmp_path, USER, ASSISTANT | empty | {"tool_calls": []}).verdict == "ok"


def test_ids_that_are_made_differ_from_those_in_the_row(tmp_path: Path) -> None:
    told = [{"role": "tool", "content": str(number)} for number in range(2)]
    line = only(tmp_path, USER, called("{}"), told[0], called("{}", id="call_0"), told[1], ASSISTANT, tools=[TOOL])
    assert line.verdict == "ok" and line.rollout is not None
    assert len({call.id for message in line.rollout.completion for call in message.tool_calls}) == 2


def test_an_id_that_a_later_turn_uses_again_belongs_to_the_call_before_the_answer(tmp_path: Path) -> None:
    again = [called('{"a": 1}', id="x"), TOLD, called('{"a": 2}', id="x"), TOLD | {"content": "14"}]
    line = only(tmp_path, USER, *again, USER, *again, ASSISTANT, tools=[TOOL])
    assert line.verdict == "ok" and line.rollout is not None
    completion = line.rollout.completion
    ids = [call.id for message in completion for call in message.tool_calls]
    assert ids[0] == "x" and len(set(ids)) == 4
    for asked, answer in pairwise(completion):
        if asked.tool_calls:
            assert answer.tool_call_id == asked.tool_calls[0].id
            assert answer.content == str(12 + asked.tool_calls[0].arguments["a"])


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": 7, "completion_tokens": 2}, {"input_tokens": 7, "prompt_tokens": 1, "output_tokens": 2}]
)
def test_counted_tokens_of_chat_completions_are_read(tmp_path: Path, usage: dict[str, int]) -> None:
    line = only(tmp_path, USER, ASSISTANT, usage=usage)
    assert line.rollout is not None and (line.rollout.input_tokens, line.rollout.output_tokens) == (7, 2)
    assert only(tmp_path, USER, ASSISTANT, usage={"prompt_tokens": 5000}).reason == "hidden_context"
