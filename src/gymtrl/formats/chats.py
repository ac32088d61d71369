"""Messages as chat templates take them, and the ways in which templates write what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from gymtrl.rollouts.record import Message

Chat = list[dict[str, Any]]


def to_chat(messages: Sequence[Message], *, developer_as_system: bool = False) -> Chat:
    """Turns messages into what templates take: arguments as objects, images as parts, no key without a value.

    Args:
        messages (`Sequence[Message]`): Of one rollout.
        developer_as_system (`bool`, *optional*, defaults to `False`): Write `system` for `developer`.
    """
    chat: Chat = []
    for message in messages:
        role = "system" if developer_as_system and message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": _parts(message) if message.images else message.content}
        if message.reasoning_content is not None:
            entry["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            entry["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            entry["name"] = message.name
        chat.append(entry)
    return chat


def in_parts(chat: Chat) -> Chat:
    """The chat with every message's content as parts, which templates of models that take images know."""
    return [
        {**entry, "content": [{"type": "text", "text": entry["content"]}]}
        if isinstance(entry.get("content"), str)
        else entry
        for entry in chat
    ]


def texts_of(message: Message) -> list[str]:
    """The text of a message, cut where images stand in it."""
    offsets = message.image_offsets or (0,) * len(message.images)
    cuts = [0, *offsets, len(message.content)]
    return [message.content[start:end] for start, end in pairwise(cuts)]


def _parts(message: Message) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts_of(message)):
        parts += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text else [])
    return parts


def argument_texts(arguments: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lists, for every key and leaf of a call's arguments, the spellings of which a rendering must show one."""
    found: list[tuple[str, ...]] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                found.append(_spellings(str(key)))
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, str):
            found.append(_spellings(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((json.dumps(value),))

    walk(arguments)
    return found


def _spellings(text: str) -> tuple[str, ...]:
    # Templates print a string bare, as JSON, as JSON that is safe within HTML, or between single quotes.
    plain = json.dumps(text, ensure_ascii=False)[1:-1]
    escaped = json.dumps(text)[1:-1]
    html = escaped
    for character in "<>&'":
        html = html.replace(character, f"\\u{ord(character):04x}")
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return (text, text.strip(), plain, escaped, html, quoted)


def squeeze(text: str) -> str:
    """Returns `text` without white space."""
    return "".join(text.split())
