"""Declared tools: as chat templates take them, and what their names and their text amount to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .codec import TOO_DEEP, canonical_json, decode_json, is_deep
from .items import Refused


@dataclass(frozen=True, eq=False, slots=True)
class Tools:
    """The tools of a request or a response.

    Attributes:
        functions (`tuple[dict[str, Any], ...]`): As `{"type": "function", "function": {...}}`.
        canonical (`bytes`): Their canonical JSON.
        names (`frozenset[str]`): Every name that is declared, also of tools that are no functions.
        length (`int`): Characters of the list as it stands in the row, written as JSON.
        all_functions (`bool`): Every tool is a function; no template shows others.
    """

    functions: tuple[dict[str, Any], ...] = ()
    canonical: bytes = b"[]"
    names: frozenset[str] = frozenset()
    length: int = 2
    all_functions: bool = True


NO_TOOLS = Tools()


# Bytes of a list above which it is not kept for the next row: what is kept is bounded by count, not by size.
_LONGEST_KEPT = 64_000


def decode_tools(data: bytes) -> Tools:
    """The tools of a list in JSON, or of nothing.

    Raises:
        `Refused`: As `read_tools`.
    """
    return _kept_tools(data) if len(data) <= _LONGEST_KEPT else _decode_tools(data)


def _decode_tools(data: bytes) -> Tools:
    if not data:
        return NO_TOOLS
    try:
        return read_tools(decode_json(data))
    except ValueError as error:
        raise Refused("malformed_json", str(error)) from None


# The rows of a file declare few different lists, each of them often.
_kept_tools = lru_cache(maxsize=256)(_decode_tools)


def read_tools(declared: Any) -> Tools:
    """The tools of a decoded list; what is no list declares none.

    Raises:
        `Refused`: If they are nested too deeply, or hold what no JSON can.
    """
    if not declared or not isinstance(declared, list):
        return NO_TOOLS
    functions = []
    names: set[str] = set()
    all_functions = True
    for tool in declared:
        inner = tool.get("function") if isinstance(tool, dict) else None
        function = inner if isinstance(inner, dict) else tool
        given = (named.get("name") for named in (tool, function) if isinstance(named, dict))
        names.update(name for name in given if isinstance(name, str))
        if (
            not isinstance(function, dict)
            or tool.get("type", "function") != "function"
            or not isinstance(function.get("name"), str)
        ):
            all_functions = False
            continue
        fields = ("name", "description", "parameters")
        kept = {field: function[field] for field in fields if function.get(field) is not None}
        functions.append({"type": "function", "function": kept})
    if is_deep(functions) or is_deep(declared):  # what no template shows counts in the length
        raise Refused("malformed_json", TOO_DEEP)
    try:
        json.dumps(functions, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Refused("roundtrip_mismatch", "a lone surrogate in a tool, which no UTF-8 text can hold") from None
    except ValueError:
        raise Refused("roundtrip_mismatch", "NaN or infinity in a tool, which no JSON can hold") from None
    length = len(json.dumps(declared, ensure_ascii=False))
    return Tools(tuple(functions), canonical_json(functions), frozenset(names), length, all_functions)
