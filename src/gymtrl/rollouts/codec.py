"""JSON as rollout files hold it, and the one canonical form that keys are taken from."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import msgspec

MAX_DEPTH = 100
"""Deepest nesting of a tool or of a call's arguments; what reads them later, such as a template, recurses into them."""

TOO_DEEP = "nested too deeply"

_strict = msgspec.json.Decoder()
_sorted = msgspec.json.Encoder(order="sorted")


def decode_json(data: bytes) -> Any:
    """Decodes one JSON document, leniently where the strict parser refuses.

    The second look admits what Python's own writer produces and RFC 8259 does not: `NaN`, `Infinity`, lone surrogates,
    a leading byte order mark, numbers beyond the range of a double.

    Args:
        data (`bytes`): The document.

    Returns:
        The decoded value.

    Raises:
        `ValueError`: If neither parser can read it.
    """
    try:
        return _strict.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # Not the bytes: Python would guess other encodings than UTF-8.
        return json.loads(data.decode("utf-8-sig", "surrogatepass"))
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error


def canonical_json(value: Any) -> bytes:
    """The canonical form of a JSON value: sorted keys, no spaces, unescaped UTF-8.

    Lone surrogates are kept (as WTF-8), so that every value which was read has a form. `NaN` and infinity become
    `null`; no chat and no tool holds them, and for what may there is `exact_json`.
    """
    try:
        return _sorted.encode(value)
    except (UnicodeEncodeError, RecursionError):
        return _python_json(value)


def exact_json(value: Any) -> bytes:
    """The canonical form in which `NaN` and infinity are told from `null`, spelled as Python's own writer does."""
    form = canonical_json(value)
    if b"null" in form:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return _python_json(value)
    return form


def _python_json(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest(value: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of a value, `NaN` and infinity told from `null`."""
    return hashlib.sha256(exact_json(value)).hexdigest()


def is_deep(value: Any) -> bool:
    """Whether a JSON value is nested deeper than `MAX_DEPTH`; looks level by level, so that any depth can be told."""
    level = [value] if type(value) is dict or type(value) is list else []
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for outer in level:
            inner += outer.values() if type(outer) is dict else outer
        level = [item for item in inner if type(item) is dict or type(item) is list]
        if not level:
            return False
    return True


def to_float(number: int | float) -> float:
    """A number as a double; an integer beyond its range becomes infinite, as `1e999` does."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def to_utf8(text: str) -> str:
    """A text whose lone surrogates, which neither JSON nor a table can hold, are replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
