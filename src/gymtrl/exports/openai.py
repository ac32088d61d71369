"""Rows of OpenAI's fine-tuning files, which other services take as well.

The formats are the schemas `FineTuneChatRequestInput` and `FineTunePreferenceRequestInput` of OpenAI's API description
(https://github.com/openai/openai-openapi), with the guides
https://developers.openai.com/api/docs/guides/supervised-fine-tuning and
https://developers.openai.com/api/docs/guides/direct-preference-optimization. They name every key that a row may have,
so the provenance stands in a file beside.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .source import Chat, Dropped, Messages, Pair, developer_as_system, needs_images, to_last_assistant

_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def sft_row(chat: Chat) -> dict[str, Any] | Dropped:
    """Returns `{"messages", "tools", "parallel_tool_calls"}`, the latter two only where there are tools.

    Assistant messages of the prompt get `"weight": 0`: they are history, and only the completion is trained. The last
    message must be the assistant's, so answers of tools that nothing follows are left out.
    """
    completion = to_last_assistant(chat.completion)
    if (refused := _refused([*chat.prompt, *completion], chat.tools)) is not None:
        return refused
    history = [
        message | {"weight": 0} if message["role"] == "assistant" else message for message in _messages(chat.prompt)
    ]
    return {"messages": history + _messages(completion), **_tools(chat.tools)}


def preference_row(pair: Pair) -> dict[str, Any] | Dropped:
    """Returns `{"input", "preferred_output", "non_preferred_output"}`, each output a single assistant message."""
    if (refused := _refused([*pair.prompt, *pair.chosen, *pair.rejected], pair.tools)) is not None:
        return refused
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in (pair.chosen, pair.rejected)):
        return Dropped("more_than_one_message", "each output is a single assistant message")
    return {
        "input": {"messages": _messages(pair.prompt), **_tools(pair.tools)},
        "preferred_output": _messages(pair.chosen),
        "non_preferred_output": _messages(pair.rejected),
    }


def _refused(messages: Messages, tools: list[dict[str, Any]]) -> Dropped | None:
    if needs_images(messages):
        return Dropped("images", "the record does not hold the images themselves")
    if any(message.get("reasoning_content") for message in messages):
        # Left out, the row would teach to answer without the thinking that led to the answer.
        return Dropped("reasoning", "the format has no place for reasoning")
    named = [tool["function"]["name"] for tool in tools]
    named += [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    wrong = next((name for name in named if not _TOOL_NAME.fullmatch(name)), None)
    if wrong is not None:
        return Dropped("tool_name", f"a tool's name may have letters, digits, _ and -, 64 at most: {wrong[:80]!r}")
    return None


def _messages(messages: Messages) -> Messages:
    made: Messages = []
    for message in developer_as_system(messages):
        entry: dict[str, Any] = {"role": message["role"]}
        calls = [
            {"id": call["id"], "type": "function", "function": _called(call["function"])}
            for call in message.get("tool_calls", ())
        ]
        if message["content"] or not calls:
            entry["content"] = message["content"]
        if calls:
            entry["tool_calls"] = calls
        if "tool_call_id" in message:
            entry["tool_call_id"] = message["tool_call_id"]
        made.append(entry)
    return made


def _called(function: dict[str, Any]) -> dict[str, str]:
    return {"name": function["name"], "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _tools(tools: list[dict[str, Any]]) -> dict[str, Any]:
    # The API's default. A value that told whether this row makes several calls would give the answer away.
    return {"tools": tools, "parallel_tool_calls": True} if tools else {}
