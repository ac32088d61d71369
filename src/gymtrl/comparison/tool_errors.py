"""Whether a tool answered with an error, as far as its text tells."""

from __future__ import annotations

import re
from typing import Any

from gymtrl.rollouts.codec import decode_json

_STARTS = ("traceback (most recent call last)", "error", "exception", "encountered exception")
_STATUS = re.compile(r"<returncode>\s*(-?\d+)\s*</returncode>|exit code:? (-?\d+)", re.IGNORECASE)
_HINTS = ('"error', '"isError"', '"is_error"', '"exit_code"', '"returncode"', '"status"')
_HEAD = 200  # characters in which a text says that it is an error
_LONGEST = 100_000  # characters of JSON that are decoded for this


def is_tool_error(text: str) -> bool:
    """Whether the text of a tool's answer is that of an error.

    It is one if it begins with `Error`, `Exception` or a Python traceback, tells an exit status other than 0, or is a
    JSON object with an error, with `"status": "error"`, or with such an exit status.
    """
    head = text[:_HEAD].lstrip()
    if head.startswith("{"):
        return len(text) <= _LONGEST and any(hint in text for hint in _HINTS) and _tells_error(text)
    if head.lower().startswith(_STARTS):
        return True
    status = _STATUS.match(head)
    return status is not None and int(status[1] or status[2]) != 0


def _tells_error(text: str) -> bool:
    try:
        answer: Any = decode_json(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return False
    if not isinstance(answer, dict):
        return False
    if any(answer.get(key) for key in ("error", "errors", "isError", "is_error")):
        return True
    statuses = [answer.get(key) for key in ("exit_code", "returncode")]
    return answer.get("status") == "error" or any(type(s) is int and s != 0 for s in statuses)
