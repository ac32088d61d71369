"""Tool calls in generated text: one reader for each way in which chat templates write them.

`hermes` and `llama3_json` read out of a whole reply what vLLM's parsers of these names read, and leave what they
leave, so that a model behaves alike behind both; vLLM's `qwen3_coder` and `mistral` let some calls through that are
cut off or have broken arguments. Everywhere arguments are an object, and a call can be sent on as JSON in UTF-8. No
regular expressions: what `.*?` tries grows with a power of the reply's length.
"""

from __future__ import annotations

import ast
import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tools = Sequence[Mapping[str, Any]]
"""OpenAI function tools."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Family:
    """A way of writing tool calls.

    Attributes:
        name (`str`): What vLLM calls its parser for it.
        read (`Callable[[str, Tools], tuple[str, list[ToolCall]]]`): The text before the calls, and the calls. Raises
            one of `MALFORMED` on what is none.
        call_id (`Callable[[], str]`): Makes an id that the templates take when the call comes back as history.
    """

    name: str
    read: Callable[[str, Tools], tuple[str, list[ToolCall]]]
    call_id: Callable[[], str]


MALFORMED = (ValueError, KeyError, TypeError, RecursionError)
"""A model may write anything: bad JSON, other keys, other types, half a surrogate pair, thousands of nested lists."""


def read_calls(text: str, family: Family, tools: Tools = ()) -> tuple[str, list[ToolCall]]:
    """Takes the tool calls out of a reply.

    Args:
        text (`str`): The reply, with the special tokens that stand in it.
        family (`Family`): How the model writes calls.
        tools (`Tools`, *optional*): Those that were offered; where arguments come as bare text, they tell the types.

    Returns:
        `tuple[str, list[ToolCall]]`: The text before the calls without white space around it, and the calls in order.
        Where one of the calls is malformed, the whole reply as it is, and no calls.
    """
    try:
        before, calls = family.read(text, tools)
    except MALFORMED:
        return text, []
    return (before.strip(), calls) if calls else (text, [])


def _call(name: Any, arguments: Any) -> ToolCall:
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    f"{call.name}{call.arguments}".encode()
    return call


def _blocks(text: str) -> tuple[str, list[str]]:
    """What stands before the first `<tool_call>`, and what stands in each; the last one need not be closed."""
    before, opened, rest = text.partition(_OPEN)
    blocks = []
    while opened:
        block, _, rest = rest.partition(_CLOSE)
        blocks.append(block)
        _, opened, rest = rest.partition(_OPEN)
    return before, blocks


def _hermes(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`"""
    before, blocks = _blocks(text)
    found = [json.loads(block) for block in blocks]
    return before, [_call(call["name"], call["arguments"]) for call in found]


def _qwen3_coder(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`"""
    before, blocks = _blocks(text)
    return before, [_function(block, tools) for block in blocks]


def _function(block: str, tools: Tools) -> ToolCall:
    outside, _, rest = block.partition("<function=")
    name, opened, rest = rest.partition(">")
    body, closed, after = rest.rpartition("</function>")
    if not opened or not closed or outside.strip() or after.strip():
        raise ValueError("no function")
    types = _types(name, tools)
    arguments = {}
    for part in body.split("<parameter=")[1:]:
        key, opened, rest = part.partition(">")
        value, closed, _ = rest.rpartition("</parameter>")
        if not opened or not closed:
            raise ValueError("no parameter")
        arguments[key] = _value(value.removeprefix("\n").removesuffix("\n"), types.get(key, []))
    return _call(name, arguments)


def _types(name: str, tools: Tools) -> dict[str, list[str]]:
    """The JSON types that each parameter of a function may have."""
    functions = (tool["function"] for tool in tools)
    parameters = next((f.get("parameters") or {} for f in functions if f["name"] == name), {})
    properties = parameters.get("properties")
    return {key: _types_of(schema) for key, schema in (properties if isinstance(properties, dict) else {}).items()}


def _types_of(schema: Any) -> list[str]:
    if not isinstance(schema, dict):
        return []
    named, others = schema.get("type"), schema.get("anyOf")
    if isinstance(named, list):
        return named
    if isinstance(others, list):
        return [kind for other in others for kind in _types_of(other)]
    return [named] if isinstance(named, str) else []


def _value(text: str, types: Sequence[str]) -> Any:
    if text in ("null", "None") and types and ("null" in types or "string" not in types):
        return None
    if not types or "string" in types:
        return text
    try:
        # Templates write truth values as Python does.
        return json.loads(text.lower() if "boolean" in types else text)
    except ValueError:
        return _python_literal(text) if {"object", "array"} & set(types) else text


def _python_literal(text: str) -> Any:
    """A list or an object as Python writes it, which some templates show the model; the text where it is none."""
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    return value if isinstance(value, dict | list) else text


def _mistral(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}]`; newer ones `[TOOL_CALLS]NAME[ARGS]{…}` for each call"""
    before, *blocks = text.split("[TOOL_CALLS]")
    if len(blocks) == 1 and blocks[0].lstrip().startswith("["):
        listed, _ = _DECODER.raw_decode(blocks[0].lstrip())
        return before, [_call(call["name"], call.get("arguments", {})) for call in listed]
    calls = []
    for block in blocks:
        name, brace, rest = block.partition("{")
        arguments, _ = _DECODER.raw_decode(brace + rest)
        calls.append(_call(name.partition("[")[0].strip(), arguments))
    return before, calls


def _llama3_json(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """`{"name": …, "parameters": {…}}`, several apart by semicolons; text around them is dropped"""
    calls = []
    place = text.find("{")
    while place >= 0:
        call, end = _DECODER.raw_decode(text, place)
        calls.append(_call(call["name"], call["arguments"] if "arguments" in call else call["parameters"]))
        place = text.find("{", end)
    return "", calls


def _any_id() -> str:
    return f"call_{secrets.token_hex(16)}"


def _nine_characters() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


FAMILIES = (
    Family("hermes", _hermes, _any_id),
    Family("qwen3_coder", _qwen3_coder, _any_id),
    Family("mistral", _mistral, _nine_characters),
    # Last: it finds its calls in the midst of other marks.
    Family("llama3_json", _llama3_json, _any_id),
)
