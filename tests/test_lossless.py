"""A record loses nothing of its row: items, whole row, dataset and Gym's own reading agree with it."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gymtrl.rollouts.codec import decode_json
from gymtrl.rollouts.extra import extra_of, rebuild_row
from gymtrl.rollouts.messages import rebuild_items
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.record import Rollout
from rows import row, write_rows

CONVERTIBLE = 485 + 53


@cache
def convertible(folder: Path) -> tuple[tuple[dict[str, Any], Rollout], ...]:
    """Every convertible row below a folder, decoded by Python's own parser, with its record."""
    read = read_lines(sorted(folder.rglob("*rollout*.jsonl")))
    return tuple((json.loads(read_bytes(line.origin)), line.rollout) for line in read if line.rollout is not None)


def same_json(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: numbers by value, so that 1 is 1.0 but not true, and NaN is NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or (one != one and other != other)
    return type(one) is type(other) and bool(one == other)


def chat_of(source: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The items of a row: what was asked, with the prompt at the head of the output, and what came after it."""
    request, output = source["responses_create_params"], source["response"]["output"]
    given = request.get("input")
    if isinstance(given, str | dict):
        given = [{"role": "user", "content": given} if isinstance(given, str) else given]
    asked = [*(given or [])]
    if isinstance(request.get("instructions"), str) and request["instructions"]:
        asked.insert(0, {"role": "system", "content": request["instructions"]})
    said = output[-1] if isinstance(output[0], list) else output
    head = 0
    while head < len(said) and kind_of(said[head]) == "message" and said[head]["role"] != "assistant":
        head += 1
    return asked + said[:head], said[head:]


def kind_of(item: dict[str, Any]) -> str:
    """A message needs no type."""
    kind = item.get("type")
    return kind if isinstance(kind, str) and kind else "message"


def substance(items: Iterable[dict[str, Any]]) -> list[Any]:
    """What items say, without ids, status, empty messages and the order inside an assistant turn."""
    told: list[Any] = []
    for item in items:
        kind = kind_of(item)
        if kind == "reasoning":
            said = ("thoughts", [part["text"] for part in (item.get("summary") or []) + (item.get("content") or [])])
        elif kind == "function_call":
            said = ("calls", [[item["call_id"], item["name"], item["arguments"]]])
        elif kind == "message" and item["role"] == "assistant":
            said = ("texts", pieces(item.get("content")))
        elif kind == "message":
            told.append([item["role"], pieces(item.get("content"))])
            continue
        else:
            told.append([kind, item["call_id"], pieces(item.get("output"))])
            continue
        if not told or not isinstance(told[-1], dict):
            told.append({"thoughts": [], "texts": [], "calls": []})
        told[-1][said[0]].extend(said[1])
    for turn in told:
        if isinstance(turn, dict):
            turn["thoughts"] = "\n\n".join(filter(None, turn["thoughts"]))
            turn["texts"] = "".join(turn["texts"])
    return [turn for turn in told if not isinstance(turn, dict) or any(turn.values())]


def pieces(content: Any) -> list[Any]:
    """Texts and images in order, neighbouring texts joined."""
    found: list[Any] = []
    for part in [{"text": content or ""}] if content is None or isinstance(content, str) else content:
        if part.get("type") == "input_image":
            url = part["image_url"]
            found.append({"image": url["url"] if isinstance(url, dict) else url})
        elif found and isinstance(found[-1], str):
            found[-1] += part["text"]
        elif part["text"]:
            found.append(part["text"])
    return found


def check_items(source: dict[str, Any], rollout: Rollout) -> None:
    asked, said = chat_of(source)
    assert substance(rebuild_items(rollout.prompt)) == substance(asked), str(rollout.origin)
    assert substance(rebuild_items(rollout.completion)) == substance(said), str(rollout.origin)


def check_row(source: dict[str, Any], rollout: Rollout) -> None:
    extra = json.loads(json.dumps(extra_of(source, rollout)))
    own = source.keys() - {"responses_create_params", "response", "reward", "agent_ref"}
    assert all(same_json(extra[key], source[key]) for key in own if not key.startswith("_ng_")), str(rollout.origin)
    assert same_json(rebuild_row(rollout, extra), source), str(rollout.origin)


def call(call_id: str, arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": arguments}


def answer(call_id: str, output: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def odd_rows(folder: Path) -> tuple[tuple[dict[str, Any], Rollout], ...]:
    """Convertible rows in forms that no shipped file has."""
    text, image = (
        {"type": "input_text", "text": "look at this"},
        {"type": "input_image", "image_url": "data:,abcdefghij"},
    )
    parameters = {"type": "object", "properties": {"a": {"default": None, "$ref": 1}}, "b": None, "c": 1.0}
    tools = [{"type": "function", "name": "f", "parameters": parameters, "strict": True}, {"type": "web_search"}]
    many = row("What is six times seven?", "42", 1.0)
    many["responses_create_params"] |= {"instructions": "Be as brief as you can.", "tools": tools, "temperature": 1}
    many["response"] |= {"model": {"name": "m"}, "usage": {"input_tokens": 1.0, "output_tokens": True}, "tools": tools}
    many["response"]["output"] = [
        {"type": "message", "role": "user", "content": [text, image, text]},
        call("call-number-1", '{"a": null, "n": 9223372036854775808, "x": 1.0, "$": {}}'),
        {"type": "message", "role": "assistant", "content": "Let me see."},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "Let me see."},
        call("call-number-2", '{"b": [], "deep": [{"x": null}, {"y": 2}]}'),
        answer("call-number-1", [text, image]),
        answer("call-number-2", ""),
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "See what I see?"}]},
    ]
    many |= {
        "$": 1,
        "agent_ref": {"$": "agent", "name": "a"},
        "note": {"$": 0},
        "_ng_environment_server": {"name": "e"},
    }
    plain = row("", "42", float("nan"), index=True, repeat=1.0, agent_ref="agent", none=None)
    plain["responses_create_params"] = {"input": "What is six times seven?", "$": {"$": 7}, "tools": None}
    far = row("What is six times seven?", "42", 10**400, note="\ud800", mask_sample=True, reward_components={"a": 1})
    tokens = {"prompt_token_ids": [1, 2], "generation_token_ids": [3], "generation_log_probs": [-1]}
    far["response"]["output"][0] |= tokens
    far["response"]["output"][0]["content"][0]["annotations"] = json.loads("[" * 300 + "]" * 300)
    rows = [many, plain, far, plain | {"reward": True}, plain | {"reward": None}]
    write_rows(folder / "rollouts.jsonl", rows)
    found = convertible(folder)
    assert len(found) == len(rows)
    return found


def test_the_items_rebuilt_from_the_messages_equal_those_of_the_row(gym_site_packages: Path, tmp_path: Path) -> None:
    found = convertible(gym_site_packages)
    assert len(found) == CONVERTIBLE
    for source, rollout in (*found, *odd_rows(tmp_path)):
        check_items(source, rollout)


def test_the_row_rebuilt_from_record_and_extra_equals_the_row(gym_site_packages: Path, tmp_path: Path) -> None:
    found = convertible(gym_site_packages)
    assert len(found) == CONVERTIBLE
    for source, rollout in (*found, *odd_rows(tmp_path)):
        check_row(source, rollout)
        check_row(decode_json(read_bytes(rollout.origin)), rollout)


def test_a_plain_chat_is_rebuilt_as_any_other_row(tmp_path: Path) -> None:
    called = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "What is six times seven?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "content": "forty-two, as it seems", "tool_call_id": "x"},
        {"role": "assistant", "content": "forty-two, as it seems"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    chat = {"messages": turns, "tools": tools, "reward": 1, "model": "m", "usage": {"prompt_tokens": 7}}
    rows: list[dict[str, Any]] = [
        chat,
        {"messages": [turns[0], turns[3]], "_ng_task_index": 3, "agent_ref": {"name": "a"}},
    ]
    rows += [chat | {"response": response} for response in ({}, {"$": 1}, "forty-two, as it seems", None)]
    rows += [chat | {"responses_create_params": {"temperature": 1}, "response": r} for r in (None, turns[3]["content"])]
    write_rows(tmp_path / "rollouts.jsonl", rows)
    found = convertible(tmp_path)
    assert len(found) == len(rows)
    for source, rollout in found:
        check_row(source, rollout)


def test_what_the_record_holds_does_not_stand_in_the_extra_again(gym_site_packages: Path) -> None:
    rows = extras = 0
    for source, rollout in convertible(gym_site_packages):
        extra = extra_of(source, rollout)
        rows += len(json.dumps([source["responses_create_params"], source["response"]]))
        extras += len(json.dumps([extra["responses_create_params"], extra["response"]]))
    assert extras < rows / 4


def test_a_dataset_holds_messages_and_tools_as_they_are(gym_site_packages: Path, tmp_path: Path) -> None:
    rollouts = [rollout for _, rollout in (*convertible(gym_site_packages), *odd_rows(tmp_path))]
    for record, text, loaded in written_and_loaded(rollouts, tmp_path):
        assert loaded["record_json"] == text
        assert all(same_view(loaded[name], record[name]) for name in record), text


@pytest.mark.parametrize("number", [2**64, 10**40, 2**64 - 1, -(2**63), -(2**63) - 1])
def test_integers_of_any_size_are_exact_in_the_record(tmp_path: Path, number: int) -> None:
    long = row("What is six times seven?", "42", 1.0)
    long["response"]["output"].append(call("call-number-1", json.dumps({"n": number})))
    write_rows(tmp_path / "rollouts.jsonl", [long])
    ((record, text, loaded),) = written_and_loaded([rollout for _, rollout in convertible(tmp_path)], tmp_path)
    assert loaded["record_json"] == text and json.loads(text) == record

    def number_of(chat: list[dict[str, Any]]) -> Any:
        return chat[-1]["tool_calls"][0]["function"]["arguments"]["n"]

    assert number_of(record["completion"]) == number
    # `datasets` has no integers beyond 64 bits: the view shows their digits.
    assert number_of(loaded["completion"]) == (number if -(2**63) <= number < 2**64 else str(number))


def written_and_loaded(rollouts: Iterable[Rollout], folder: Path) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Records with their JSON, and what `datasets` reads after the project has written them."""
    from datasets import load_dataset

    from gymtrl.formats.chats import in_parts, to_chat
    from gymtrl.formats.dataset import ParquetRows, schemas
    from gymtrl.formats.example import Example, holds_images, whole
    from gymtrl.formats.sft import messages

    def record(example: Example) -> dict[str, Any]:
        chats = {"prompt": to_chat(example.prompt), "completion": to_chat(example.completion)}
        if holds_images(example):
            chats = {name: in_parts(chat) for name, chat in chats.items()}
        return {**chats, "tools": [*example.tools]}

    examples = [whole(rollout) for rollout in rollouts]
    records = [record(example) for example in examples]
    written = [messages(example) for example in examples]
    texts = [columns["record_json"] for columns in written]
    assert [json.loads(text) for text in texts] == records
    with ParquetRows(folder, "rows", *schemas("sft"), numbered=False) as file:
        for columns in written:
            file.write(columns)
    path = folder / "rows.parquet"
    loaded = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    return list(zip(records, texts, loaded, strict=True))


def same_view(view: Any, record: Any) -> bool:
    """Whether values are equal in type and every key; `datasets` may read the last of a float's 17 digits wrong."""
    if isinstance(view, dict) and isinstance(record, dict):
        return view.keys() == record.keys() and all(same_view(view[key], record[key]) for key in record)
    if isinstance(view, list) and isinstance(record, list):
        return len(view) == len(record) and all(map(same_view, view, record))
    if isinstance(view, float) and isinstance(record, float):
        return math.isclose(view, record, rel_tol=1e-15)
    return type(view) is type(record) and bool(view == record)


ORACLE = r"""
import json, sys
from nemo_gym.openai_utils import NeMoGymResponseCreateParamsNonStreaming as Params
from nemo_gym.responses_converter import ResponsesConverter
converter = ResponsesConverter(return_token_id_information=False)
for line in sys.stdin:
    items = json.loads(line)
    chat = converter.responses_to_chat_completion_create_params(Params(input=items))
    print(json.dumps(chat.model_dump(exclude_unset=True)["messages"]))
"""


def test_messages_equal_those_of_gyms_own_converter(gym_site_packages: Path, gym_python: Path, tmp_path: Path) -> None:
    found = convertible(gym_site_packages)
    assert len(found) == CONVERTIBLE
    run = subprocess.run(
        [str(gym_python), "-c", ORACLE],
        input="\n".join(json.dumps([*before, *after]) for before, after in (chat_of(source) for source, _ in found)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    theirs = [[gym_message(message) for message in json.loads(line)] for line in run.stdout.splitlines()]
    ours = [our_messages(rollout) for _, rollout in found]
    assert len(theirs) == len(ours)
    origins = [str(rollout.origin) for _, rollout in found]
    assert [at for at, mine, gyms in zip(origins, ours, theirs, strict=True) if mine != gyms] == []


def our_messages(rollout: Rollout) -> list[tuple[Any, ...]]:
    messages = []
    for message in (*rollout.prompt, *rollout.completion):
        thoughts = message.reasoning_content
        content = (f"<think>{thoughts}</think>" if thoughts is not None else "") + message.content
        calls = [(c.id, c.name, c.arguments) for c in message.tool_calls]
        messages.append((message.role, content, list(message.images), calls, message.tool_call_id))
    return messages


def gym_message(message: dict[str, Any]) -> tuple[Any, ...]:
    content = message.get("content") or ""
    images = []
    if isinstance(content, list):
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        content = "".join(part["text"] for part in content if part["type"] == "text")
    calls = [
        (c["id"], c["function"]["name"], json.loads(c["function"]["arguments"]))
        for c in message.get("tool_calls") or []
    ]
    content = content.replace("</think><think>", "\n\n")
    return message["role"], content, images, calls, message.get("tool_call_id")
