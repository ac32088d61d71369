"""Files of tasks that must stay unseen, such as benchmarks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import TOO_DEEP, canonical_json, decode_json, is_deep
from gymtrl.rollouts.convert import judge
from gymtrl.rollouts.items import Refused
from gymtrl.rollouts.keys import input_key, look_up
from gymtrl.rollouts.loose import read_conversation
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.record import Line, Message, Origin
from gymtrl.rollouts.sidecars import Sidecar
from gymtrl.text import plain

_CHATS = ("messages", "prompt")
_TEXTS = ("prompt", "question", "problem", "input", "text", "instruction")
_ANSWER = {"output": [{"type": "message", "role": "assistant", "content": "."}]}


class HeldOut(NamedTuple):
    """A task that must stay unseen.

    Attributes:
        file (`str`): The file that names it.
        line (`int`): The line, from 1.
        text (`str`): What it asks.
        task_key, input_key (`str`, *optional*): Its keys, where the line gives them.
        frame (`str`): What is said besides by others than the user, in a rollout or an input row.
        agent (`str`, *optional*): Who is asked, where an input row names it.
    """

    file: str
    line: int
    text: str
    task_key: str | None
    input_key: str | None
    frame: str = ""
    agent: str | None = None


def held_out_texts(path: Path) -> list[HeldOut]:
    """Reads a file of tasks that must stay unseen.

    Args:
        path (`Path`): JSONL of Gym rollouts, of Gym input rows, of chats (`messages`, or `prompt` as a list), or of
            rows with a text under `prompt`, `question`, `problem`, `input`, `text` or `instruction`. A row with
            several of them counts once for each.

    Returns:
        `list[HeldOut]`: In the order of the lines.

    Raises:
        `UserError`: If the file is missing or empty, or a line names no task.
    """
    found = [task for line in read_lines([path]) for task in _tasks(line)]
    if not found:
        raise UserError(f"{path} has no rows", remedy="name a JSONL file with one held-out task a line")
    return found


def asked_task_key(row: dict[str, Any], origin: Origin) -> str | None:
    """The task key that a rollout of an input row has, unless a harness changes the prompt or names a server."""
    answered = canonical_json({**row, "response": _ANSWER, "reward": 0.0})
    rollout = judge(answered, origin, Sidecar(None, {}), None).rollout
    return rollout.task_key if rollout is not None else None


def prompt_text(messages: Sequence[Message]) -> str:
    """What a prompt asks: its user turns, or all of it where there are none.

    The system prompt, and assistant and tool turns (worked examples, what came before the question), are left out:
    they are the environment's and much the same in all its tasks. An image counts as one word, made of its URL.
    """
    asked = [message for message in messages if message.role == "user"]
    return _joined(asked).strip() or _joined(messages).strip()


def frame_text(messages: Sequence[Message]) -> str:
    """What stands around what a prompt asks: all turns but the user's; nothing where the user has none."""
    others = [message for message in messages if message.role != "user"]
    return _joined(others).strip() if len(others) < len(messages) else ""


def _tasks(line: Line) -> Iterator[HeldOut]:
    """The tasks that a line of a held-out file names."""
    file, number = line.origin.file, line.origin.line
    if line.rollout is not None:
        told = line.rollout
        asked, frame = prompt_text(told.prompt), frame_text(told.prompt)
        yield HeldOut(file, number, asked, told.task_key, told.input_key, frame, told.agent)
        return
    if line.reason in ("malformed_json", "not_object", "line_too_long"):
        raise UserError(f"{line.origin} is no JSON object that can be read: {plain(line.detail)}")
    row = decode_json(read_bytes(line.origin))
    if is_deep(row):
        raise UserError(f"{line.origin} is {TOO_DEEP}")
    if isinstance(row.get("responses_create_params"), dict):
        key = input_key(row) if line.reason in ("task_only", "materialized_input") else None
        prompt, agent = _asked(row["responses_create_params"], line), look_up(row, "agent_ref.name")
        name = agent if isinstance(agent, str) else None
        yield HeldOut(file, number, prompt_text(prompt), None, key, frame_text(prompt), name)
        return
    chats = [prompt_text(_chat(row[name])) for name in _CHATS if isinstance(row.get(name), list)]
    texts = [text for text in (*chats, *(row.get(name) for name in _TEXTS)) if isinstance(text, str) and text.strip()]
    if not texts:
        keys = ", ".join(list(map(str, row))[:10]) or "none"
        raise UserError(
            f"{line.origin} names no task that could be held out; its keys: {plain(keys)}",
            remedy=f"give each row its text under one of {', '.join(_TEXTS)}, or a chat under messages",
        )
    for text in texts:
        yield HeldOut(file, number, text, None, None)


def _asked(request: dict[str, Any], line: Line) -> Sequence[Message]:
    """The prompt of an input row, read as that of a rollout would be."""
    try:
        return read_conversation(request, _ANSWER).prompt
    except Refused as refused:
        raise UserError(f"{line.origin} holds no prompt that can be read: {plain(refused.detail)}") from None


def _chat(turns: Sequence[Any]) -> list[Message]:
    """The texts of a chat in the form of chat completions."""
    found = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if isinstance(content, str):
            found.append(Message(role=turn.get("role"), content=content))
    return found


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(text for message in messages for text in (message.content, *map(_image_word, message.images)))


def _image_word(url: str) -> str:
    return f"image:{hashlib.blake2b(url.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"
