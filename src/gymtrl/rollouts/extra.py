"""What the fields of a record do not hold of its row, so that the two together give the row back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .codec import MAX_DEPTH, exact_json, is_deep
from .record import Rollout

_CHAT = ("responses_create_params", "response")
_REFERENCE = "$"
_SHORTEST = 12  # characters; a reference is no shorter
_LONG_VALUES = frozenset({"parameters", "prompt_token_ids", "generation_token_ids", "generation_log_probs"})


def extra_of(row: dict[str, Any], rollout: Rollout) -> dict[str, Any]:
    """What a row holds beside its record.

    Keys of the environment stay as they are. In request and response, a text or list that the record holds becomes
    `{"$": place}`; scalars that it holds in a field of their own are left out. The messages of a plain chat stay whole.

    Args:
        row (`dict[str, Any]`): The decoded row.
        rollout (`Rollout`): The record that was read from it.

    Returns:
        `dict[str, Any]`: JSON data from which `rebuild_row` makes the row again.
    """
    places = {value if isinstance(value, str) else exact_json(value): i for i, value in enumerate(_held(rollout))}
    extra = _subtract(row, _fields(row, rollout))
    if not _is_gym(row):
        return extra
    return extra | {name: _pack(extra[name], places, 0) for name in _CHAT}


def rebuild_row(rollout: Rollout, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The row that a record was read from.

    Args:
        rollout (`Rollout`): The record.
        extra (`Mapping[str, Any]`): What `extra_of` gave for it.

    Returns:
        `dict[str, Any]`: Equal to the row as JSON; the order of keys is not kept.
    """
    row = {**extra}
    if _is_gym(extra):
        held = list(_held(rollout))
        row |= {name: _unpack(extra[name], held, 0) for name in _CHAT}
    return _add(row, _fields(extra, rollout))


def _is_gym(row: Mapping[str, Any]) -> bool:
    """Whether a row, or its extra, has request and response as Gym writes them; a plain chat does not."""
    return all(isinstance(row.get(name), dict) for name in _CHAT)


def _fields(row: Mapping[str, Any], rollout: Rollout) -> dict[str, Any]:
    """The scalar fields, each where a row has it; `None` where this row does not."""
    usage = {"input_tokens": rollout.input_tokens, "output_tokens": rollout.output_tokens}
    fields = {
        "reward": rollout.reward,
        "_ng_task_index": rollout.task_index,
        "_ng_rollout_index": rollout.rollout_index,
        "_ng_environment_server": rollout.environment,
        "agent_ref": {"name": rollout.agent},
    }
    if not _is_gym(row):
        return fields
    sampling, told = msgspec.structs.asdict(rollout.sampling), {"model": rollout.model, "usage": usage}
    return fields | {"responses_create_params": sampling, "response": told}


def _subtract(value: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    left = {}
    for key, item in value.items():
        field = fields.get(key)
        if isinstance(field, dict):
            left[key] = _subtract(item, field) if isinstance(item, dict) else item
        elif field is None or isinstance(item, bool) or item != field:
            left[key] = item
    return left


def _add(value: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    for key, field in fields.items():
        if isinstance(field, dict):
            if isinstance(value.get(key), dict):
                value[key] = _add({**value[key]}, field)
        elif field is not None:
            value.setdefault(key, field)
    return value


def _held(rollout: Rollout) -> Iterator[Any]:
    """The long values of a record, in an order that depends on the record alone."""
    for message in (*rollout.prompt, *rollout.completion):
        yield from (message.content, message.reasoning_content or "", *message.images)
        for call in message.tool_calls:
            yield from (call.id, call.name, call.arguments_json)
    for tool in rollout.tools:
        yield from (tool["function"].get(name) for name in ("name", "description", "parameters"))
    for turn in rollout.recorded:
        yield from (list(turn.prompt_token_ids), list(turn.generation_token_ids), list(turn.generation_log_probs))


def _pack(value: Any, places: Mapping[str | bytes, int], depth: int) -> Any:
    # Deeper than any chat the value stays as it is, so that no row is too deep to be walked through.
    if isinstance(value, str):
        place = places.get(value) if len(value) >= _SHORTEST else None
        return value if place is None else {_REFERENCE: place}
    if depth > MAX_DEPTH or not isinstance(value, dict | list):
        return value
    if isinstance(value, list):
        return [_pack(item, places, depth + 1) for item in value]
    packed = {}
    for key, item in value.items():
        known = key in _LONG_VALUES and isinstance(item, dict | list) and not is_deep(item)
        place = places.get(exact_json(item)) if known else None
        packed[key] = _pack(item, places, depth + 1) if place is None else {_REFERENCE: place}
    return {_REFERENCE: packed} if _REFERENCE in packed else packed


def _unpack(value: Any, held: list[Any], depth: int) -> Any:
    if isinstance(value, dict) and _REFERENCE in value:
        value = value[_REFERENCE]  # the place, or an object that has this key itself
        if isinstance(value, int):
            return held[value]
    if depth > MAX_DEPTH or not isinstance(value, dict | list):
        return value
    if isinstance(value, list):
        return [_unpack(item, held, depth + 1) for item in value]
    return {key: _unpack(item, held, depth + 1) for key, item in value.items()}
