"""One Responses item at a time: what it is, what it says, and whether it can be read at all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import msgspec

from .codec import TOO_DEEP, is_deep

# Tuples, since what is looked up in them comes from a file and may have no hash.
_MESSAGE_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text")
_TOKEN_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
_arguments_decoder = msgspec.json.Decoder(dict[str, Any])


class Refused(Exception):
    """A row that is no conversation, with the reason code and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class Item(NamedTuple):
    """A Responses item, read.

    Attributes:
        kind (`str`): `message`, `reasoning`, `function_call` or `function_call_output`.
        role (`str`): Role of a message, else `""`.
        text (`str`): Text of a message, a reasoning or a tool's answer.
        images, image_offsets (`tuple`): URLs, and the characters of `text` before each.
        call_id, name, arguments, arguments_json: Of calls; an answer has the first.
        tokens (`tuple`, *optional*): Recorded prompt ids, generated ids and log-probabilities, as the item holds them.
    """

    kind: str
    role: str = ""
    text: str = ""
    images: tuple[str, ...] = ()
    image_offsets: tuple[int, ...] = ()
    call_id: str = ""
    name: str = ""
    arguments: dict[str, Any] | None = None
    arguments_json: str = ""
    tokens: tuple[Any, Any, Any] | None = None


def kind_of(item: Any) -> str:
    """The item's type; a role without a type makes a message. `""` where there is neither."""
    if not isinstance(item, dict):
        return ""
    kind = item.get("type")
    if isinstance(kind, str) and kind:
        return kind
    return "message" if isinstance(item.get("role"), str) else ""


def is_policy(item: Any) -> bool:
    """Whether the policy produced the item."""
    kind = kind_of(item)
    return kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")


def is_prompt(item: Any) -> bool:
    """Whether the item, at the head of the output, belongs to the prompt."""
    return kind_of(item) == "message" and item.get("role") in ("system", "developer", "user")


def check_types(items: Iterable[Any]) -> None:
    """Refuses items of a type, or messages of a role, that no chat has a place for."""
    for item in items:
        kind = kind_of(item)
        if kind == "message" and item.get("role") not in _MESSAGE_ROLES:
            label = _label(item.get("role"))
            raise Refused(f"unsupported_item_type:{label}", f"a message of role {label}")
        if kind not in ("message", "reasoning", "function_call", "function_call_output"):
            label = _label(kind or type(item).__name__)
            raise Refused(f"unsupported_item_type:{label}", f"an item of type {label}")


def check_parts(items: Sequence[Any]) -> None:
    """Refuses content that is neither text nor image; refusals last, since the other hides more."""
    refusal = False
    for item in items:
        kind = item.get("type")
        if kind == "function_call":
            continue
        if kind == "reasoning":
            for field in ("summary", "content"):
                _reasoning_parts(item.get(field))
            continue
        content = item.get("output") if kind == "function_call_output" else item.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            _unsupported(type(content).__name__)
        for part in content:
            part_kind = part.get("type") if isinstance(part, dict) else None
            if part_kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                continue
            if part_kind == "refusal":
                refusal = True
            elif not (part_kind == "input_image" and item.get("role") != "assistant" and _image_url(part)):
                _unsupported(str(part_kind or type(part).__name__))
    if refusal:
        raise Refused("refusal_part", "a part that the provider marked as a refusal")


def check_calls(items: Sequence[Any]) -> None:
    """Refuses calls and answers that do not belong together, in the order in which the reasons rank."""
    calls = [item for item in items if kind_of(item) == "function_call"]
    answers = [item for item in items if kind_of(item) == "function_call_output"]
    for item in (*calls, *answers):
        if not (isinstance(item.get("call_id"), str) and item["call_id"]):
            raise Refused("missing_call_id", f"a {item['type']} without call_id")
    _refuse_repeats(calls, "duplicate_call_id", "two calls have the id")
    for call in calls:
        parse_arguments(call)
    known: set[str] = set()
    for item in items:
        if kind_of(item) == "function_call":
            known.add(item["call_id"])
        elif kind_of(item) == "function_call_output" and item["call_id"] not in known:
            raise Refused("orphan_tool_output", f"an answer to {item['call_id']!r}, which nobody called before")
    _refuse_repeats(answers, "duplicate_tool_output", "two answers to the call")
    answered = {item["call_id"] for item in answers}
    # An episode may end with calls that nobody executed. Anything after them says that somebody did.
    end = len(items)
    while end and kind_of(items[end - 1]) == "function_call":
        end -= 1
    for item in items[:end]:
        if kind_of(item) == "function_call" and item["call_id"] not in answered:
            raise Refused("missing_tool_output", f"no answer to the call {item['call_id']!r} of {item.get('name')}")


def check_turns(output: Sequence[Any]) -> None:
    """Refuses output in which several model calls stand side by side with nothing to tell them apart."""
    spoken = False
    unanswered: set[str] = set()
    for item in output:
        kind = kind_of(item)
        if kind == "function_call":
            unanswered.add(item["call_id"])
        elif kind == "function_call_output":
            unanswered.discard(item["call_id"])
            spoken = False
        elif not is_policy(item):
            spoken = False
        elif spoken and not unanswered:
            raise Refused("ambiguous_turns", f"a {kind} follows an assistant message with nothing between them")
        elif kind == "message":
            spoken = True


def parse_arguments(call: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of a call as an object, and as they were written.

    Raises:
        `Refused`: `bad_tool_arguments` where they are no JSON object or nested too deeply, or the call has no name.
    """
    raw = call.get("arguments")
    name = call.get("name")
    if not isinstance(raw, str) or not isinstance(name, str) or not name:
        raise Refused("bad_tool_arguments", f"a call of {name!r} whose arguments are {type(raw).__name__}")
    arguments = _decode_arguments(raw)
    if not isinstance(arguments, dict):
        raise Refused("bad_tool_arguments", f"the arguments of a call of {name} are no JSON object: {raw[:80]!r}")
    if is_deep(arguments):
        raise Refused("bad_tool_arguments", f"the arguments of a call of {name} are {TOO_DEEP}")
    return arguments, raw


def _decode_arguments(raw: str) -> Any:
    try:
        return _arguments_decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        pass
    try:
        return json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def parse_item(item: dict[str, Any]) -> Item:
    """Reads an item that passed the checks."""
    kind = kind_of(item)
    tokens = None
    if item.get("generation_token_ids"):
        tokens = (item.get(_TOKEN_FIELDS[0]), item[_TOKEN_FIELDS[1]], item.get(_TOKEN_FIELDS[2]))
    if kind == "function_call":
        arguments, raw = parse_arguments(item)
        return Item(
            kind, call_id=item["call_id"], name=item["name"], arguments=arguments, arguments_json=raw, tokens=tokens
        )
    if kind == "reasoning":
        texts = [*_reasoning_parts(item.get("summary")), *_reasoning_parts(item.get("content"))]
        return Item(kind, text="\n\n".join(text for text in texts if text), tokens=tokens)
    if kind == "function_call_output":
        text, images, offsets = _content(item.get("output"))
        return Item(kind, text=text, images=images, image_offsets=offsets, call_id=item["call_id"])
    text, images, offsets = _content(item.get("content"))
    return Item(kind, role=item["role"], text=text, images=images, image_offsets=offsets, tokens=tokens)


def _content(content: Any) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    if content is None or isinstance(content, str):
        return content or "", (), ()
    texts: list[str] = []
    images: list[str] = []
    offsets: list[int] = []
    length = 0
    for part in content:
        if part["type"] == "input_image":
            images.append(_image_url(part))
            offsets.append(length)
        else:
            texts.append(part["text"])
            length += len(part["text"])
    return "".join(texts), tuple(images), tuple(offsets) if any(offsets) else ()


def _reasoning_parts(parts: Any) -> list[str]:
    if parts is None:
        return []
    if not isinstance(parts, list):
        _unsupported(type(parts).__name__)
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            _unsupported("reasoning without text")
        texts.append(text)
    return texts


def _image_url(part: dict[str, Any]) -> str:
    url = part.get("image_url")
    if isinstance(url, dict):
        url = url.get("url")
    return url if isinstance(url, str) else ""


def _refuse_repeats(items: Iterable[dict[str, Any]], reason: str, words: str) -> None:
    seen: set[str] = set()
    for item in items:
        if item["call_id"] in seen:
            raise Refused(reason, f"{words} {item['call_id']!r}")
        seen.add(item["call_id"])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is beyond the range of a double")
    return value


def _unsupported(found: str) -> NoReturn:
    raise Refused("unsupported_content_part", f"content of type {_label(found)}")


def _label(value: Any) -> str:
    """A type name taken from the file, short and harmless in a reason code."""
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in str(value))[:40] or "none"
