"""Rollouts with tools, and token ids as Gym would have recorded them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rows import row

TOOL = {
    "type": "function",
    "name": "weigh",
    "description": "Weighs a thing.",
    "parameters": {"type": "object", "properties": {"x": {"type": "string", "default": None}}},
}


def tool_row(
    question: str, steps: Sequence[tuple[str, str]], answer: str, reward: float | None, **more: Any
) -> dict[str, Any]:
    """A rollout that weighs things, each with what the tool returned, before it answers."""
    made = row(question, answer, reward, **more)
    made["responses_create_params"]["tools"] = [TOOL]
    calls: list[dict[str, Any]] = []
    for number, (thing, result) in enumerate(steps):
        arguments = json.dumps({"x": thing})
        calls += [
            {"type": "function_call", "call_id": f"c{number}", "name": "weigh", "arguments": arguments},
            {"type": "function_call_output", "call_id": f"c{number}", "output": result},
        ]
    made["response"]["output"] = calls + made["response"]["output"]
    return made


def cut(made: dict[str, Any]) -> dict[str, Any]:
    """The rollout, stopped by the limit of output tokens; recorded ids lose the token that ends the last turn."""
    last = made["response"]["output"][-1]
    for key in ("generation_token_ids", "generation_log_probs"):
        if key in last:
            last[key] = last[key][:-1]
    made["response"] |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return made


def recorded(made: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The rollout with recorded ids and log-probabilities for each turn.

    Log-probabilities are -1/2, -1/4, -1/8 … within each turn.
    """
    params, output = made["responses_create_params"], made["response"]["output"]
    chat: list[dict[str, Any]] = [dict(message) for message in params["input"]]
    tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in params["tools"]]
    for item in output:
        if item["type"] == "function_call_output":
            chat.append({"role": "tool", "content": item["output"], "name": "weigh"})
            continue
        before = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, tokenize=False)
        if item["type"] == "function_call":
            call = {"name": item["name"], "arguments": json.loads(item["arguments"])}
            chat.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
        else:
            chat.append({"role": "assistant", "content": item["content"][0]["text"]})
        after = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
        turn = after[len(before) :].rstrip("\n")
        ids = tokenizer.encode(turn, add_special_tokens=False)
        item["prompt_token_ids"] = tokenizer.encode(before, add_special_tokens=False)
        item["generation_token_ids"] = ids
        item["generation_log_probs"] = [-(0.5**power) for power in range(1, len(ids) + 1)]
    return made
