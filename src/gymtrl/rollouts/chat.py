"""Plain chat rows (`messages`, and optionally `tools` and `reward`), brought into the form of Gym's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

_UNFIT = {"audio": "input_audio", "refusal": "refusal"}  # keys of a turn, and the part that each stands for
_USAGE = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether the row is a chat as chat completions write it."""
    turns = row.get("messages")
    return isinstance(turns, list) and bool(turns) and all(isinstance(t, dict) and "role" in t for t in turns)


def as_rollout(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with request and response; what the policy produced begins with the first assistant message.

    Calls and answers without an id get one: answers belong to the calls in their order. So do calls whose id an earlier
    turn has used up: there an answer belongs to the call before it.
    """
    output: list[dict[str, Any]] = []
    turns = row["messages"]
    given = set(_given_ids(turns))
    made = (name for name in map("call_{}".format, count()) if name not in given)
    used: set[str] = set()
    unanswered: dict[str, str] = {}  # id in the row → id in the record
    for turn in turns:
        if turn["role"] == "tool":
            answered = turn.get("tool_call_id") or next(iter(unanswered), None)
            if isinstance(answered, str):
                answered = unanswered.pop(answered, answered)
            output.append({"type": "function_call_output", "call_id": answered, "output": _parts(turn.get("content"))})
            continue
        output += _said(turn)
        for call in _calls(turn):
            if not isinstance(call, dict):
                output.append({"type": "tool_call"})
                continue
            call_id = renamed = call.get("id") or next(made)
            if isinstance(call_id, str):
                if call_id in used and call_id not in unanswered:
                    renamed = next(made)
                used.add(call_id)
                unanswered[call_id] = renamed
            output.append(_call(call, renamed))
    request = {"tools": row.get("tools")}
    response = {"output": output, "model": row.get("model"), "usage": _usage(row.get("usage"))}
    return row | {"responses_create_params": request, "response": response}


def _given_ids(turns: list[dict[str, Any]]) -> Iterator[str]:
    for turn in turns:
        calls = (call.get("id") for call in _calls(turn) if isinstance(call, dict))
        yield from (given for given in (turn.get("tool_call_id"), *calls) if isinstance(given, str))


def _calls(turn: dict[str, Any]) -> list[Any]:
    """The calls of a turn; what is no call, the older `function_call` included, is there to be refused."""
    calls = turn.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        calls = [None]
    return [*(calls or []), *([None] if turn.get("function_call") else [])]


def _said(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """What a turn says beside its calls."""
    content, thoughts = _parts(turn.get("content")), turn.get("reasoning_content") or turn.get("reasoning")
    unfit = [{"type": kind} for key, kind in _UNFIT.items() if turn.get(key)]
    if unfit and not isinstance(content, list):
        content = [{"type": "text", "text": content}] if content else []
    said: list[dict[str, Any]] = []
    if thoughts:
        said.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": thoughts}]})
    if content or unfit or not (thoughts or _calls(turn)):
        said.append({"type": "message", "role": turn["role"], "content": [*content, *unfit] if unfit else content})
    return said


def _call(call: dict[str, Any], call_id: Any) -> dict[str, Any]:
    function = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function_call", "call_id": call_id, "name": function.get("name"), "arguments": arguments}


def _parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        part | {"type": "input_image"} if isinstance(part, dict) and part.get("type") == "image_url" else part
        for part in content
    ]


def _usage(usage: Any) -> Any:
    """Counted tokens by the names of the Responses interface."""
    if not isinstance(usage, dict):
        return usage
    return {new: usage[old] for old, new in _USAGE.items() if old in usage} | usage
