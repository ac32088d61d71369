"""Keys that say which rollouts belong together, in this run and in any other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .codec import canonical_json, digest
from .record import Message

# Settings of the request that change from one collection of a task to the next, or between its repeats.
SAMPLING_PARAMETERS = frozenset(
    {
        "background",
        "frequency_penalty",
        "include",
        "max_output_tokens",
        "max_tool_calls",
        "min_p",
        "model",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "reasoning",
        "repetition_penalty",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "temperature",
        "top_k",
        "top_logprobs",
        "top_p",
        "truncation",
        "user",
    }
)
# Gym passes further sampling parameters, the seed of a repeat among them, as a JSON string in the metadata.
EXTRA_BODY = "extra_body"

MISSING: Any = object()

_encoder = msgspec.json.Encoder()


def plain_message(message: Message) -> dict[str, Any]:
    """A message as plain data without call ids, which say nothing about what was asked or done."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.images:
        plain["images"] = list(message.images)
    if message.image_offsets:
        plain["image_offsets"] = list(message.image_offsets)
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    if message.name is not None:
        plain["name"] = message.name
    return plain


def task_key(name: str | None, prompt: Sequence[Message], tools: bytes) -> str:
    """Key of a task as the policy saw it, the same in every run.

    Args:
        name (`str`, *optional*): Environment server, else agent.
        prompt (`Sequence[Message]`): The messages before the policy's first output.
        tools (`bytes`): The declared tools as canonical JSON.

    Returns:
        `str`: SHA-256 (hex).
    """
    asked = canonical_json([name, [plain_message(message) for message in prompt]])
    return hashlib.sha256(asked[:-1] + b"," + tools + b"]").hexdigest()


def completion_key(completion: Sequence[Message]) -> str:
    """Key of what the policy and its environment said: equal where the text is, arguments as written, ids aside."""
    told: list[tuple[Any, ...]] = []
    for message in completion:
        told.append((message.role, message.content, message.reasoning_content, message.name))
        if message.tool_calls:
            told += [(call.name, call.arguments_json) for call in message.tool_calls]
        if message.images:
            told.append((message.images, message.image_offsets))
    return hashlib.sha256(_encoder.encode(told)).hexdigest()


def input_key(row: Mapping[str, Any]) -> str:
    """Key of a task's input row, whether it comes from an input file or from the materialized inputs of a run.

    Left out: `agent_ref`, `_ng_*` keys, sampling parameters, and fields of the request that are null.

    Args:
        row (`Mapping`): The input row.

    Returns:
        `str`: SHA-256 (hex).
    """
    kept = {key: value for key, value in row.items() if key != "agent_ref" and not key.startswith("_ng_")}
    request = kept.get("responses_create_params")
    if isinstance(request, dict):
        request = {k: v for k, v in request.items() if v is not None and k not in SAMPLING_PARAMETERS}
        metadata = request.get("metadata")
        if isinstance(metadata, dict):
            metadata = {key: value for key, value in metadata.items() if key != EXTRA_BODY}
            request["metadata"] = metadata
            if not metadata:
                del request["metadata"]
        kept["responses_create_params"] = request
    return digest(kept)


def look_up(value: Any, path: str) -> Any:
    """The value at a dotted path (`metadata.template`; digits index lists), or `MISSING` where it is absent or null."""
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return MISSING if value is None else value


def named_cluster(path: str, row: Any, input_row: Any) -> str | None:
    """Key of the cluster that a row names itself.

    Args:
        path (`str`): Dotted path, looked up in the row, then in its input row.
        row, input_row: The decoded rows; the latter may be `None`.

    Returns:
        `str`, *optional*: SHA-256 (hex) of the value found; `None` where there is none.
    """
    for source in (row, input_row):
        value = look_up(source, path)
        if value is not MISSING:
            return digest(value)
    return None
