"""A row as Gym wrote it, typed: what is needed is decoded, everything else is checked as JSON and passed over."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType


class Part(Struct, gc=False):
    """A part of an item's content."""

    type: str | None = None
    text: str | None = None
    image_url: Any = None


class Item(Struct, gc=False):
    """A Responses item of any type that a chat has a place for; a role without a type makes a message."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    generation_token_ids: tuple[int, ...] | None = None
    generation_log_probs: tuple[float, ...] | None = None


class Metadata(Struct, gc=False):
    """Of `metadata` what says that the model heard something."""

    audio_data: Any = None
    audio_url: Any = None
    audio_path: Any = None


class Request(Struct, gc=False):
    """`responses_create_params`."""

    input: Raw = Raw()
    instructions: Any = None
    tools: Raw = Raw()
    metadata: Metadata | None = None
    temperature: Any = None
    top_p: Any = None
    max_output_tokens: Any = None


class Usage(Struct, gc=False):
    """Tokens that the model server counted."""

    input_tokens: Any = None
    output_tokens: Any = None


class Response(Struct, gc=False):
    """`response`."""

    output: list[Item] = []
    usage: Usage | None = None
    status: Any = None
    incomplete_details: Any = None
    model: Any = None
    tools: Raw = Raw()


class Facts(Struct, gc=False):
    """What stands at the top of a row beside request and response."""

    reward: Any = None
    reward_components: Any = None
    mask_sample: Any = None
    agent_ref: Any = None
    _ng_task_index: Any = None
    _ng_rollout_index: Any = None
    _ng_environment_server: Any = None
    _ng_failure_class: Any = None


class Row(Facts, gc=False):
    """A rollout whose items are all of the usual shape; by the last three a row that is none is told."""

    responses_create_params: Request | UnsetType = UNSET
    response: Response | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    _ng_result_type: Raw | UnsetType = UNSET
    episode_interaction_protocol: Raw | UnsetType = UNSET


T = TypeVar("T", bound=Struct)
_decoder = msgspec.json.Decoder(Row)
_input_decoder = msgspec.json.Decoder(str | list[Item] | None)
_keys_decoder = msgspec.json.Decoder(dict[str, Raw])


def decode_row(data: bytes) -> Row | None:
    """Decodes a row of the usual shape.

    Args:
        data (`bytes`): One line.

    Returns:
        `Row`: `None` where the line is no JSON, or anything in it has another type than usual.
    """
    try:
        row = _decoder.decode(data)
        if not data.isascii():
            data.decode()  # what is passed over is not looked at by the decoder
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return row


def decode_input(data: bytes) -> list[Item] | None:
    """Decodes `input`, where a text is a message of the user; `None` where it has another shape than usual."""
    try:
        given = _input_decoder.decode(data) if data else None
    except (msgspec.MsgspecError, RecursionError):
        return None
    if isinstance(given, str):
        return [Item("message", "user", given)]
    return given or []


def keys_of(data: bytes) -> list[str]:
    """The keys of a row that `decode_row` could decode."""
    return list(_keys_decoder.decode(data))


def pick(kind: type[T], row: dict[str, Any], *names: str) -> T:
    """Some fields of an object that was decoded without types."""
    return kind(**{name: row.get(name) for name in names})
