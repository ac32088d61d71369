"""Messages to prompt tokens, and generated text to a reply with tool calls."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gymtrl.errors import UserError

Message = dict[str, Any]

# What rendering takes for itself. Documents are the one of its own parameters that only templates read.
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote: the function's name and its arguments as JSON text."""

    name: str
    arguments: str


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Renders a conversation with the model's chat template, up to where the reply begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Brings the template.
        messages (`Sequence[Message]`): OpenAI messages with plain text content; arguments of tool calls may be JSON.
        tools (`Sequence[Mapping]`, *optional*): OpenAI function tools.
        template_kwargs (`Mapping`, *optional*): More variables for the template.

    Returns:
        `tuple[int, ...]`: Token ids.

    Raises:
        UserError: There is no template, it fails on these messages, it would leave out something that matters (tools,
            tool calls or a developer message), or its text cannot be tokenised.
    """
    reserved = _RESERVED & set(template_kwargs or {})
    if reserved:
        raise UserError(f"chat_template_kwargs may not set {', '.join(sorted(reserved))}")
    if not tokenizer.chat_template:
        raise UserError(
            "the model has no chat template",
            remedy="serve an instruction-tuned model, or add a template to it",
        )

    def render(shown: Sequence[Message], offered: Sequence[Mapping[str, Any]] | None) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in shown],
            tools=[dict(tool) for tool in offered] if offered else None,
            add_generation_prompt=True,
            tokenize=False,
            **(template_kwargs or {}),
        )
        assert isinstance(text, str)
        return text

    try:
        prepared = [_for_template(message) for message in messages]
        text = render(prepared, tools)
        _refuse_omissions(render, prepared, tools, text)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    except UserError:
        raise
    except TemplateError as error:
        raise UserError(f"the model's chat template rejects these messages: {error}") from error
    except Exception as error:
        # Templates are programs: on odd messages they raise whatever Python raises, down to RecursionError.
        raise UserError(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
        ) from error


def _for_template(message: Message) -> Message:
    prepared = {key: value for key, value in message.items() if value is not None}
    prepared.setdefault("content", "")
    if prepared.get("tool_calls"):
        # Templates print arguments as JSON themselves; text would come out quoted twice.
        prepared["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": _parsed(call["function"]["arguments"]),
                },
            }
            for call in prepared["tool_calls"]
        ]
    else:
        prepared.pop("tool_calls", None)
    return prepared


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        # A model's malformed call, sent back as history: the template shows it as it was.
        return arguments


def _refuse_omissions(
    render: Any, messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, text: str
) -> None:
    remedy = "serve the model with a template that has tools, such as the one that TRL ships for Qwen2.5"
    if tools and render(messages, None) == text:
        raise UserError("the model's chat template knows no tools", remedy=remedy)
    if any("tool_calls" in message for message in messages):
        without = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        if render(without, tools) == text:
            raise UserError("the model's chat template leaves out tool calls", remedy=remedy)
    for message in messages:
        if message["role"] == "developer" and message["content"].strip() not in text:
            raise UserError(
                "the model's chat template leaves out developer messages",
                remedy="send them with the role system (Gym: replace_developer_role_with_system: true)",
            )


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Takes Hermes tool calls, `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, out of a reply.

    Args:
        text (`str`): The reply.

    Returns:
        `tuple[str, list[ToolCall]]`: What remains, and the calls in order. A block that is no valid call stays text.
        Without any call the text is returned as it is, else white space around the remainder is dropped.
    """
    calls: list[ToolCall] = []
    kept: list[str] = []
    position = 0
    # No regular expression: on a reply of unclosed tags, what `.*?` tries grows with a power of its length.
    while (begin := text.find(_OPEN, position)) >= 0 and (end := text.find(_CLOSE, begin)) >= 0:
        after = end + len(_CLOSE)
        call = _tool_call(text[begin + len(_OPEN) : end])
        kept.append(text[position : begin if call else after])
        if call:
            calls.append(call)
        position = after
    kept.append(text[position:])
    return ("".join(kept).strip(), calls) if calls else (text, [])


def _tool_call(block: str) -> ToolCall | None:
    """The call that a block holds, if it is one that can be sent on: as JSON, in UTF-8."""
    try:
        read = json.loads(block.strip())
        if not isinstance(read, dict):
            return None
        name, arguments = read.get("name"), read.get("arguments", {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        f"{call.name}{call.arguments}".encode()
    except (ValueError, RecursionError):
        # A model may write anything: bad JSON, NaN, half of a surrogate pair, thousands of nested lists.
        return None
    return call
