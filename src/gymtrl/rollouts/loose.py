"""A second look at rows of an unusual shape: brought into the usual one, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise, takewhile
from typing import Any, NoReturn

from .codec import to_float
from .items import KINDS, ROLES, TEXT_PARTS, Refused, image_url
from .messages import Conversation, Prompt, read_items, read_prompt
from .source import Item, Part


def read_conversation(request: dict[str, Any], response: dict[str, Any]) -> Conversation:
    """Reads the chat of a decoded row.

    Args:
        request (`dict`): `responses_create_params`.
        response (`dict`): `response`.

    Raises:
        `Refused`: With the first reason, in the order in which they rank, why the row is no conversation.
    """
    asked, output = loose_items(request, response)
    conversation = read_items(read_prompt(asked), output)
    refuse_surrogates(conversation)
    return conversation


def loose_items(request: dict[str, Any], response: dict[str, Any]) -> tuple[list[Item], list[Item]]:
    """The items of request and response, whatever their shape.

    Args:
        request (`dict`): `responses_create_params`.
        response (`dict`): `response`.

    Returns:
        The items that were sent, instructions included, and those that came back.

    Raises:
        `Refused`: With the first reason, in the order in which they rank, why the shape is that of no chat.
    """
    output = flat_output(response.get("output"))
    _refuse_audio(request, output)
    asked = _input_items(request)
    if not asked and not (output and _is_prompt(output[0])):
        raise Refused("no_prompt", "neither input nor instructions, and the output starts with the policy")
    if not any(map(_is_policy, output)):
        raise Refused("no_assistant_turn", "the output holds nothing that the policy said")
    everything = [*asked, *output]
    _check_types(everything)
    _check_parts(everything)
    return list(map(_item, asked)), list(map(_item, output))


def loose_prompt(request: dict[str, Any], response: dict[str, Any]) -> Prompt:
    """What was sent, whatever came back.

    Args:
        request (`dict`): `responses_create_params`.
        response (`dict`): `response`; the head of its output may belong to the prompt.

    Raises:
        `Refused`: If nothing was sent, or what was sent is no chat.
    """
    _refuse_audio(request, ())
    try:
        output = flat_output(response.get("output"))
    except Refused:
        output = []
    items = [*_input_items(request), *takewhile(_is_prompt, output)]
    if not items:
        raise Refused("no_prompt", "neither input nor instructions, nor a prompt at the head of the output")
    _check_types(items)
    _check_parts(items)
    return read_prompt(list(map(_item, items)))


def flat_output(output: Any) -> list[Any]:
    """The items of `response.output`: of cumulative transitions, each of which begins with the one before, the last."""
    if not isinstance(output, list) or not output:
        raise Refused("empty_output", "response.output holds nothing")
    if not any(isinstance(item, list) for item in output):
        return output
    if not all(isinstance(item, list) for item in output):
        raise Refused("noncumulative_transitions", "output mixes items and lists of items")
    for earlier, later in pairwise(output):
        if earlier != later[: len(earlier)]:
            raise Refused("noncumulative_transitions", "a transition does not start with the one before it")
    last: list[Any] = output[-1]
    if not last:
        raise Refused("empty_output", "the last transition holds nothing")
    return last


def _refuse_audio(request: dict[str, Any], output: Sequence[Any]) -> None:
    metadata = request.get("metadata")
    for key in ("audio_data", "audio_url", "audio_path"):
        if isinstance(metadata, dict) and metadata.get(key):
            raise Refused("unsupported_modality_audio", f"metadata.{key}: the model heard audio")
    given = request.get("input")
    for item in chain(given if isinstance(given, list) else (), output):
        content = _shown(item)
        if isinstance(content, list) and any(isinstance(p, dict) and p.get("type") == "input_audio" for p in content):
            raise Refused("unsupported_modality_audio", "an input_audio part: the model heard audio")


def _input_items(request: dict[str, Any]) -> list[Any]:
    given = request.get("input")
    instructions = request.get("instructions")
    items: list[Any] = []
    if isinstance(instructions, str) and instructions:
        items.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        items.append({"role": "user", "content": given})
    elif isinstance(given, list):
        items.extend(given)
    elif given is not None:
        items.append(given)
    return items


def _kind(item: Any) -> str:
    """The item's type; a role without a type makes a message. `""` where there is neither."""
    if not isinstance(item, dict):
        return ""
    kind = item.get("type")
    if isinstance(kind, str) and kind:
        return kind
    return "message" if isinstance(item.get("role"), str) else ""


def _shown(item: Any) -> Any:
    """What the chat shows of a message or of a tool's answer."""
    kind = _kind(item)
    if kind == "function_call_output":
        return item.get("output")
    return item.get("content") if kind == "message" else None


def _is_policy(item: Any) -> bool:
    kind = _kind(item)
    return kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")


def _is_prompt(item: Any) -> bool:
    return _kind(item) == "message" and item.get("role") in ("system", "developer", "user")


def refuse_surrogates(conversation: Conversation) -> None:
    """Refuses text that no file in UTF-8 can hold.

    Raises:
        `Refused`: If there is a lone surrogate in anything that the chat keeps.
    """
    for message in (*conversation.prompt, *conversation.completion):
        _refuse_surrogates(message.content)
        _refuse_surrogates(message.reasoning_content or "")
        _refuse_surrogates("".join(message.images))
        _refuse_surrogates(message.tool_call_id or "")
        for call in message.tool_calls:
            # A break between them: the halves of a pair must not heal each other.
            _refuse_surrogates(f"{call.id}\n{call.name}\n{call.arguments_json}")
            if "\\u" in call.arguments_json:  # an escape may hide one
                _refuse_surrogates(json.dumps(call.arguments, ensure_ascii=False))


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("roundtrip_mismatch", "a lone surrogate, which no UTF-8 text can hold") from None


def _check_types(items: Iterable[Any]) -> None:
    """Refuses items of a type, or messages of a role, that no chat has a place for."""
    for item in items:
        kind = _kind(item)
        if kind == "message" and item.get("role") not in ROLES:
            label = _label(item.get("role"))
            raise Refused(f"unsupported_item_type:{label}", f"a message of role {label}")
        if kind not in KINDS:
            label = _label(kind or type(item).__name__)
            raise Refused(f"unsupported_item_type:{label}", f"an item of type {label}")


def _check_parts(items: Sequence[Any]) -> None:
    """Refuses content that is neither text nor image; refusals last, since the other hides more."""
    refusal = False
    for item in items:
        kind = _kind(item)
        if kind == "reasoning":
            for field in ("summary", "content"):
                _check_thought(item.get(field))
        images = kind == "function_call_output" or item.get("role") != "assistant"
        content = _shown(item)
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            _unsupported(type(content).__name__)
        for part in content:
            part_kind = part.get("type") if isinstance(part, dict) else None
            if part_kind in TEXT_PARTS and isinstance(part.get("text"), str):
                continue
            if part_kind == "refusal":
                refusal = True
            elif not (images and part_kind == "input_image" and image_url(_part(part))):
                _unsupported(str(part_kind or type(part).__name__))
    if refusal:
        raise Refused("refusal_part", "a part that the provider marked as a refusal")


def _check_thought(parts: Any) -> None:
    if parts is None:
        return
    if not isinstance(parts, list):
        _unsupported(type(parts).__name__)
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        _unsupported("reasoning without text")


def _item(item: dict[str, Any]) -> Item:
    """An item that passed the checks."""
    log_probs = _numbers(item.get("generation_log_probs"), (int, float))
    return Item(
        type=_kind(item),  # type: ignore[arg-type]  # as was checked
        role=_text(item.get("role")),  # type: ignore[arg-type]
        content=_content(item.get("content")),
        summary=_content(item.get("summary")),  # type: ignore[arg-type]  # a list, as was checked
        call_id=_text(item.get("call_id")),
        name=_text(item.get("name")),
        arguments=_text(item.get("arguments")),
        output=_content(item.get("output")),
        prompt_token_ids=_numbers(item.get("prompt_token_ids"), (int,)),
        generation_token_ids=_numbers(item.get("generation_token_ids"), (int,)),
        generation_log_probs=None if log_probs is None else tuple(map(to_float, log_probs)),
    )


def _content(content: Any) -> str | list[Part] | None:
    if isinstance(content, list):
        return [_part(part) for part in content if isinstance(part, dict)]
    return _text(content)


def _part(part: dict[str, Any]) -> Part:
    return Part(_text(part.get("type")), _text(part.get("text")), part.get("image_url"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _numbers(values: Any, kinds: tuple[type, ...]) -> tuple[Any, ...] | None:
    return tuple(values) if isinstance(values, list) and all(type(value) in kinds for value in values) else None


def _unsupported(found: str) -> NoReturn:
    raise Refused("unsupported_content_part", f"content of type {_label(found)}")


def _label(value: Any) -> str:
    """A type name taken from the file, short and harmless in a reason code."""
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in str(value))[:40] or "none"
