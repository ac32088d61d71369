"""JSON as rollout files hold it, and the one canonical form that keys are taken from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

_strict = msgspec.json.Decoder()


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
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def canonical_json(value: Any) -> bytes:
    """The canonical form of a JSON value: sorted keys, no spaces, unescaped UTF-8.

    Lone surrogates are kept (as WTF-8), so that every value which was read has a form.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def digest(value: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
