"""Whether plain TRL, which gets messages and renders them itself, trains the very tokens of a row."""

from __future__ import annotations

from typing import Any

from gymtrl.formats.chats import to_chat
from gymtrl.formats.checks import Tokenized
from gymtrl.formats.example import Example
from gymtrl.formats.templates import RENDER_ERRORS, ModelTemplate


def is_plain(example: Example, tokens: Tokenized, template: ModelTemplate) -> bool:
    """Compares a row with what TRL's trainer for pairs makes of its messages.

    Args:
        example (`Example`): The messages.
        tokens (`Tokenized`): The row.
        template (`ModelTemplate`): Of the model.

    Returns:
        `bool`: The model's own template gives the same ids for the prompt and for all of it, and nothing in the calls
            and tools is a number that the `Json()` view changes.
    """
    if tokens.flags or tokens.route == "recorded":
        return False
    arguments = [call.arguments for message in example.messages for call in message.tool_calls]
    if _holds_odd_number([arguments, *example.tools]):
        return False
    prompt, tools = to_chat(example.prompt), list(example.tools) or None
    try:
        (head,) = template.render([prompt], tools, template=template.stock, generation_prompt=True)
        (text,) = template.render([[*prompt, *to_chat(example.completion)]], tools, template=template.stock)
    except RENDER_ERRORS:
        return False
    before, all_of_it = template.encode_all([head, text])
    return all_of_it == tokens.input_ids and all_of_it[: tokens.spans[0][0]] == before


def _holds_odd_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_odd_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) or (type(value) is int and not -(2**63) <= value < 2**64)
