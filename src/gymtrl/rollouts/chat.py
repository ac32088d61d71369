"""Plain chat rows (`messages`, and optionally `tools` and `reward`), brought into the form of Gym's."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether the row is a chat as chat completions write it."""
    turns = row.get("messages")
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and "role" in t for t in turns)


def as_rollout(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with request and response; what the policy produced begins with the first assistant message.

    Calls and answers without an id get one: answers belong to the calls in their order.
    """
    output: list[dict[str, Any]] = []
    ids = (f"call_{number}" for number in count())
    unanswered: deque[str] = deque()
    for turn in row["messages"]:
        role, content = turn["role"], _parts(turn.get("content"))
        if role == "tool":
            answered = turn.get("tool_call_id") or (unanswered[0] if unanswered else None)
            if isinstance(answered, str) and answered in unanswered:
                unanswered.remove(answered)
            output.append({"type": "function_call_output", "call_id": answered, "output": content})
            continue
        calls = turn.get("tool_calls") or []
        thoughts = turn.get("reasoning_content") or turn.get("reasoning")
        if thoughts:
            output.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": thoughts}]})
        if content or not (calls or thoughts):
            output.append({"type": "message", "role": role, "content": content})
        for call in calls if isinstance(calls, list) else []:
            item = _call(call, call.get("id") or next(ids)) if isinstance(call, dict) else {"type": "tool_call"}
            unanswered.append(item.get("call_id", ""))
            output.append(item)
    request = {"tools": row.get("tools")}
    response = {"output": output, "model": row.get("model"), "usage": row.get("usage")}
    return row | {"responses_create_params": request, "response": response}


def _call(call: dict[str, Any], call_id: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments")  # type: ignore[union-attr]
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "type": "function_call",
        "call_id": call_id,
        "name": function.get("name"),  # type: ignore[union-attr]
        "arguments": arguments,
    }


def _parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        part | {"type": "input_image"} if isinstance(part, dict) and part.get("type") == "image_url" else part
        for part in content
    ]
