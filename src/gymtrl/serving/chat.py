"""Messages to prompt tokens, and how a model's chat template writes tool calls."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gymtrl.errors import UserError
from gymtrl.serving.tool_calls import FAMILIES, Family, ToolCall, read_calls

Message = dict[str, Any]

# What rendering takes for itself. Documents are the one of its own parameters that only templates read.
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"}

_PROBE = {"qz": "qz value"}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "qzName",
        "description": "qz",
        "parameters": {"type": "object", "properties": {"qz": {"type": "string"}}, "required": ["qz"]},
    },
}


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


def call_family(tokenizer: PreTrainedTokenizerBase) -> Family | None:
    """Finds out how a model writes tool calls: its chat template writes one, and whoever reads it back has it.

    Returns:
        `Family`, *optional*: `None` where the template writes none, or in a way that no reader knows.
    """
    user = {"role": "user", "content": "qz"}
    # As Mistral's templates want their ids.
    call = {"id": "qz1234567", "type": "function", "function": {"name": "qzName", "arguments": _PROBE}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        head, text = (
            str(tokenizer.apply_chat_template(chat, tools=[_PROBE_TOOL], add_generation_prompt=asks, tokenize=False))
            for chat, asks in (([user], True), ([user, turn], False))
        )
    except Exception:
        # Templates are programs, and raise whatever Python raises.
        return None
    begin = next((i for i, (a, b) in enumerate(zip(head, text, strict=False)) if a != b), len(head))
    wanted = [ToolCall("qzName", json.dumps(_PROBE))]
    return next((family for family in FAMILIES if read_calls(text[begin:], family, [_PROBE_TOOL])[1] == wanted), None)
