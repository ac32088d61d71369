"""Responses items → the chat that the policy saw: prompt and completion messages, or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from . import items as it
from .codec import to_float
from .items import Item, Refused
from .record import Message, RecordedTurn, ToolCall


class Conversation(NamedTuple):
    """A chat read from items.

    Attributes:
        prompt, completion (`tuple[Message, ...]`): Before, and from, the policy's first output.
        recorded (`tuple[RecordedTurn, ...]`): Token ids, one entry an assistant message of the completion; else empty.
        flags (`frozenset[str]`): Remarks.
        head (`Sequence[dict]`): Items at the head of the output that belong to the prompt, as the row holds them.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    recorded: tuple[RecordedTurn, ...]
    flags: frozenset[str]
    head: Sequence[dict[str, Any]]


def read_conversation(request: dict[str, Any], response: dict[str, Any]) -> Conversation:
    """Reads the chat of one rollout.

    Args:
        request (`dict`): `responses_create_params`.
        response (`dict`): `response`.

    Returns:
        `Conversation`: Prompt and completion; items rebuilt from them equal the source.

    Raises:
        `Refused`: With the first reason, in the order in which they rank, why the row is no conversation.
    """
    output = _flat_output(response.get("output"))
    _refuse_audio(request, output)
    asked = _input_items(request)
    cut = next((i for i, item in enumerate(output) if not it.is_prompt(item)), len(output))
    head, said = output[:cut], output[cut:]
    before = [*asked, *head]
    if not before:
        raise Refused("no_prompt", "neither input nor instructions, and the output starts with the policy")
    if not any(it.is_policy(item) for item in said):
        raise Refused("no_assistant_turn", "the output holds nothing that the policy said")
    everything = [*before, *said]
    it.check_types(everything)
    it.check_parts(everything)
    it.check_calls(everything)
    it.check_turns(said)

    prompt_items = [it.parse_item(item) for item in before]
    said_items = [it.parse_item(item) for item in said]
    names = {item.call_id: item.name for item in chain(prompt_items, said_items) if item.kind == "function_call"}
    prompt = [message for message, _ in _fold(prompt_items, names) if not _is_empty(message)]
    turns = list(_fold(said_items, names))
    if any(_is_empty(message) for message, _ in turns):
        raise Refused("empty_assistant", "an assistant turn without text, visible reasoning or call")
    completion = [message for message, _ in turns]
    for source, messages in ((prompt_items, prompt), (said_items, completion)):
        _check_round_trip(source, messages)
    recorded = _recorded([tokens for message, tokens in turns if message.role == "assistant"])
    return Conversation(tuple(prompt), tuple(completion), recorded, _flags(prompt_items, said_items), head)


def rebuild_items(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The Responses items of a chat: the way back, equal to the source up to ids, status and the order in one turn."""
    rebuilt: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "tool":
            content = _rebuild_content(message, "input_text")
            rebuilt.append({"type": "function_call_output", "call_id": message.tool_call_id, "output": content})
            continue
        if message.reasoning_content is not None:
            summary = [{"type": "summary_text", "text": message.reasoning_content}]
            rebuilt.append({"type": "reasoning", "summary": summary})
        if message.content or message.images or message.role != "assistant":
            kind = "output_text" if message.role == "assistant" else "input_text"
            rebuilt.append({"type": "message", "role": message.role, "content": _rebuild_content(message, kind)})
        rebuilt.extend(
            {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments_json}
            for call in message.tool_calls
        )
    return rebuilt


def _rebuild_content(message: Message, kind: str) -> str | list[dict[str, Any]]:
    if not message.images and kind == "input_text":
        return message.content
    parts: list[dict[str, Any]] = []
    start = 0
    offsets = message.image_offsets or (0,) * len(message.images)
    for image, offset in zip(message.images, offsets, strict=True):
        if offset > start:
            parts.append({"type": kind, "text": message.content[start:offset]})
            start = offset
        parts.append({"type": "input_image", "image_url": image})
    if start < len(message.content):
        parts.append({"type": kind, "text": message.content[start:]})
    return parts


def _flat_output(output: Any) -> list[Any]:
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
    if isinstance(metadata, dict):
        for key in ("audio_data", "audio_url", "audio_path"):
            if metadata.get(key):
                raise Refused("unsupported_modality_audio", f"metadata.{key}: the model heard audio")
    given = request.get("input")
    for item in chain(given if isinstance(given, list) else (), output):
        content = item.get("content") if isinstance(item, dict) else None
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


def _fold(items: Iterable[Item], names: dict[str, str]) -> Iterable[tuple[Message, list[tuple[Any, Any, Any]]]]:
    """Messages, each with the token records of its items; an item of another speaker closes an assistant message."""
    turn: list[Item] = []
    for item in items:
        if item.kind in ("reasoning", "function_call") or item.role == "assistant":
            turn.append(item)
            continue
        if turn:
            yield _assistant(turn)
            turn = []
        if item.kind == "function_call_output":
            yield (
                Message(
                    role="tool",
                    content=item.text,
                    images=item.images,
                    image_offsets=item.image_offsets,
                    tool_call_id=item.call_id,
                    name=names[item.call_id],
                ),
                [],
            )
        else:
            yield (
                Message(
                    role=item.role,  # type: ignore[arg-type]  # check_types admits these roles only
                    content=item.text,
                    images=item.images,
                    image_offsets=item.image_offsets,
                ),
                [],
            )
    if turn:
        yield _assistant(turn)


def _assistant(turn: Sequence[Item]) -> tuple[Message, list[tuple[Any, Any, Any]]]:
    thoughts = [item.text for item in turn if item.kind == "reasoning" and item.text]
    message = Message(
        role="assistant",
        content="".join(item.text for item in turn if item.kind == "message"),
        reasoning_content="\n\n".join(thoughts) if thoughts else None,
        tool_calls=tuple(
            ToolCall(item.call_id, item.name, item.arguments or {}, item.arguments_json)
            for item in turn
            if item.kind == "function_call"
        ),
    )
    return message, [item.tokens for item in turn if item.tokens is not None]


def _is_empty(message: Message) -> bool:
    said = message.content or message.reasoning_content or message.tool_calls
    return message.role == "assistant" and not said


def _recorded(turns: Sequence[list[tuple[Any, Any, Any]]]) -> tuple[RecordedTurn, ...]:
    """Token ids of every turn, or of none: half a record cannot be trained on."""
    recorded = []
    for tokens in turns:
        if len(tokens) != 1:
            return ()
        prompt, generated, log_probs = tokens[0]
        if not (isinstance(prompt, list) and isinstance(generated, list) and isinstance(log_probs, list)):
            return ()
        if not prompt or len(generated) != len(log_probs):
            return ()
        if not all(type(i) is int for i in chain(prompt, generated)):
            return ()
        if not all(type(p) in (float, int) for p in log_probs):
            return ()
        recorded.append(RecordedTurn(tuple(prompt), tuple(generated), tuple(map(to_float, log_probs))))
    return tuple(recorded)


def _flags(prompt: Sequence[Item], said: Sequence[Item]) -> frozenset[str]:
    flags = set()
    if any(item.kind == "reasoning" and not item.text for item in said):
        flags.add("reasoning_hidden")
    if any(item.role == "developer" for item in chain(prompt, said)):
        flags.add("developer_role")
    if any(item.role == "assistant" and ("<think>" in item.text or "</think>" in item.text) for item in said):
        flags.add("think_in_content")
    if any(item.tokens is not None for item in said):
        flags.add("token_ids")
    return frozenset(flags)


def _check_round_trip(source: Sequence[Item], messages: Sequence[Message]) -> None:
    rebuilt = [it.parse_item(item) for item in rebuild_items(messages)]
    if _essence(source) != _essence(rebuilt):
        raise Refused("roundtrip_mismatch", "the items rebuilt from the messages differ from the row's")
    for message in messages:
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


def _essence(items: Iterable[Item]) -> list[tuple[Any, ...]]:
    """Items with the order inside an assistant turn, empty messages and ids of messages taken out."""
    found: list[tuple[Any, ...]] = []
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[tuple[str, str, str]] = []

    def close() -> None:
        if thoughts or texts or calls:
            found.append(("assistant", "\n\n".join(thoughts), "".join(texts), tuple(calls)))
        thoughts.clear()
        texts.clear()
        calls.clear()

    for item in items:
        if item.kind == "function_call":
            calls.append((item.call_id, item.name, item.arguments_json))
        elif item.kind == "reasoning":
            thoughts.extend([item.text] if item.text else [])
        elif item.role == "assistant":
            texts.extend([item.text] if item.text else [])
        else:
            close()
            found.append((item.kind, item.role, item.call_id, item.text, item.images, item.image_offsets))
    close()
    return found
