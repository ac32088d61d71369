"""Items of the usual shape: which of them no chat can be made of, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import msgspec

from .codec import MAX_DEPTH, TOO_DEEP, is_deep
from .record import ToolCall
from .source import Item, Part

ROLES = ("system", "developer", "user", "assistant")
KINDS = ("message", "reasoning", "function_call", "function_call_output")
TEXT_PARTS = ("input_text", "output_text", "text")
_arguments_decoder = msgspec.json.Decoder(dict[str, Any])


class Refused(Exception):
    """A row that is no conversation, with the reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def is_regular(items: Iterable[Item]) -> bool:
    """Whether every item has content of a known kind; gives a type to messages that have none."""
    for item in items:
        kind = item.type
        if kind is None:
            kind = item.type = "message"
        if kind == "message":
            role = item.role
            if role is None or not (type(item.content) is str or _is_content(item.content, images=role != "assistant")):
                return False
        elif kind == "reasoning":
            if not (_is_thought(item.summary) and _is_thought(item.content)):
                return False
        elif kind == "function_call_output" and not _is_content(item.output, images=True):
            return False
    return True


def is_policy(item: Item) -> bool:
    """Whether the policy produced the item."""
    kind = item.type
    return kind == "reasoning" or kind == "function_call" or (kind == "message" and item.role == "assistant")


def has_calls(items: Iterable[Item]) -> bool:
    """Whether there are calls among the items, or answers to calls."""
    return not {item.type for item in items}.isdisjoint(("function_call", "function_call_output"))


def read_calls(items: Sequence[Item]) -> dict[str, ToolCall]:
    """The calls of a chat by their ids.

    Raises:
        `Refused`: If calls and answers do not belong together; of several reasons the first in rank.
    """
    if not has_calls(items):
        return {}
    calls = [item for item in items if item.type == "function_call"]
    answers = [item for item in items if item.type == "function_call_output"]
    for item in (*calls, *answers):
        if not item.call_id:
            raise Refused("missing_call_id", f"a {item.type} without call_id")
    _refuse_repeats(calls, "duplicate_call_id", "two calls have the id")
    read = {call.call_id or "": _read_call(call) for call in calls}
    known: set[str | None] = set()
    for item in items:
        if item.type == "function_call":
            known.add(item.call_id)
        elif item.type == "function_call_output" and item.call_id not in known:
            raise Refused("orphan_tool_output", f"an answer to {item.call_id!r}, which nobody called before")
    _refuse_repeats(answers, "duplicate_tool_output", "two answers to the call")
    answered = {item.call_id for item in answers}
    # An episode may end with calls that nobody executed. Anything after them says that somebody did.
    end = len(items)
    while end and items[end - 1].type == "function_call":
        end -= 1
    for item in items[:end]:
        if item.type == "function_call" and item.call_id not in answered:
            raise Refused("missing_tool_output", f"no answer to the call {item.call_id!r} of {item.name}")
    return read


def check_turns(output: Iterable[Item]) -> None:
    """Refuses output in which several model calls stand side by side with nothing to tell them apart."""
    spoken = False
    unanswered: set[str | None] = set()
    for item in output:
        kind = item.type
        if kind == "function_call":
            unanswered.add(item.call_id)
        elif kind == "function_call_output":
            unanswered.discard(item.call_id)
            spoken = False
        elif kind == "message" and item.role != "assistant":
            spoken = False
        elif spoken and not unanswered:
            raise Refused("ambiguous_turns", f"a {kind} follows an assistant message with nothing between them")
        elif kind == "message":
            spoken = True


def _is_content(content: str | list[Part] | None, *, images: bool) -> bool:
    if content is None or type(content) is str:
        return True
    for part in content:
        kind = part.type  # type: ignore[union-attr]
        if kind in TEXT_PARTS:
            if part.text is None:  # type: ignore[union-attr]
                return False
        elif not (images and kind == "input_image" and image_url(part)):  # type: ignore[arg-type]
            return False
    return True


def _is_thought(parts: str | list[Part] | None) -> bool:
    return parts is None or (type(parts) is list and all(part.text is not None for part in parts))


def image_url(part: Part) -> str:
    """The URL of an image part, `""` where it has none."""
    url = part.image_url
    if isinstance(url, dict):
        url = url.get("url")
    return url if isinstance(url, str) else ""


def _read_call(call: Item) -> ToolCall:
    raw, name = call.arguments, call.name
    if raw is None or not name:
        raise Refused("bad_tool_arguments", f"a call of {name!r} whose arguments are {type(raw).__name__}")
    arguments = _decode_arguments(raw)
    if not isinstance(arguments, dict):
        raise Refused("bad_tool_arguments", f"the arguments of a call of {name} are no JSON object: {raw[:80]!r}")
    if len(raw) > MAX_DEPTH and is_deep(arguments):
        raise Refused("bad_tool_arguments", f"the arguments of a call of {name} are {TOO_DEEP}")
    return ToolCall(call.call_id or "", name, arguments, raw)


def _decode_arguments(raw: str) -> Any:
    try:
        return _arguments_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        pass
    try:
        return json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _refuse_repeats(items: Iterable[Item], reason: str, words: str) -> None:
    seen: set[str | None] = set()
    for item in items:
        if item.call_id in seen:
            raise Refused(reason, f"{words} {item.call_id!r}")
        seen.add(item.call_id)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is beyond the range of a double")
    return value
