"""Responses items → the chat that the policy saw: prompt and completion messages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .items import Refused, check_turns, has_calls, image_url, is_policy, read_calls
from .record import Message, RecordedTurn, ToolCall
from .source import Item, Part


class Conversation(NamedTuple):
    """A chat read from items.

    Attributes:
        prompt, completion (`tuple[Message, ...]`): Before, and from, the policy's first output.
        recorded (`tuple[RecordedTurn, ...]`): Token ids, one entry an assistant message of the completion; else empty.
        called (`set[str]`): Names of the functions that are called, in the prompt or by the policy.
        flags (`set[str]`): Remarks.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    recorded: tuple[RecordedTurn, ...]
    called: set[str]
    flags: set[str]


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """What was sent, read; one object for all rollouts that were sent the same.

    Attributes:
        items (`Sequence[Item]`): Regular items, instructions included.
        messages (`tuple[Message, ...]`, *optional*): Their messages; `None` where calls stand among them, of which only
            the whole chat tells whether they are sound.
        flags (`frozenset[str]`): Remarks.
    """

    items: Sequence[Item]
    messages: tuple[Message, ...] | None
    flags: frozenset[str] = frozenset()


def read_prompt(items: Sequence[Item]) -> Prompt:
    """Reads regular items that were sent."""
    if has_calls(items):
        return Prompt(items, None)
    flags: set[str] = set()
    return Prompt(items, _fold_prompt(items, {}, flags), frozenset(flags))


def prompt_messages(asked: Prompt) -> tuple[Message, ...]:
    """The messages of what was sent, where nothing that came back is needed to tell them.

    Raises:
        `Refused`: If calls and answers in it do not belong together.
    """
    return asked.messages if asked.messages is not None else _fold_prompt(asked.items, read_calls(asked.items), set())


def prompt_head(output: Iterable[Item]) -> int:
    """How many items at the head of the output belong to the prompt: messages of system, developer or user."""
    count = 0
    for item in output:
        if item.type != "message" or item.role == "assistant":
            break
        count += 1
    return count


def read_items(asked: Prompt, output: Sequence[Item]) -> Conversation:
    """Reads the chat of one rollout.

    Args:
        asked (`Prompt`): What was sent.
        output (`Sequence[Item]`): What came back, regular.

    Returns:
        `Conversation`: Prompt and completion; items rebuilt from them equal the source.

    Raises:
        `Refused`: With the first reason, in the order in which they rank, why the items are no sound chat.
    """
    cut = prompt_head(output)
    before = read_prompt([*asked.items, *output[:cut]]) if cut else asked
    said = output[cut:]
    if not before.items:
        raise Refused("no_prompt", "neither input nor instructions, and the output starts with the policy")
    if not any(map(is_policy, said)):
        raise Refused("no_assistant_turn", "the output holds nothing that the policy said")
    calls = read_calls(said if before.messages is not None else [*before.items, *said])
    if len(said) > 1:
        check_turns(said)
    flags = set(before.flags)
    prompt = before.messages
    if prompt is None:
        prompt = _fold_prompt(before.items, calls, flags)
    completion, turns = _fold(said, calls, flags)
    if any(map(_is_empty, completion)):
        raise Refused("empty_assistant", "an assistant turn without text, visible reasoning or call")
    recorded: tuple[RecordedTurn, ...] = ()
    if any([item.generation_token_ids for item in said]):
        recorded = _recorded(turns)
        if not recorded:
            flags.add("token_ids_partial")
    return Conversation(prompt, tuple(completion), recorded, {call.name for call in calls.values()}, flags)


def text_length(messages: Iterable[Message]) -> int:
    """Characters of text, reasoning and call arguments."""
    length = 0
    for message in messages:
        length += len(message.content)
        if message.role == "assistant":
            if message.reasoning_content:
                length += len(message.reasoning_content)
            for call in message.tool_calls:
                length += len(call.arguments_json)
    return length


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


def _fold_prompt(items: Iterable[Item], calls: Mapping[str, ToolCall], flags: set[str]) -> tuple[Message, ...]:
    """The messages of a prompt without empty ones; what the policy said in it earlier needs no remark."""
    found: set[str] = set()
    messages, _ = _fold(items, calls, found)
    flags |= found & {"developer_role"}
    return tuple(message for message in messages if not _is_empty(message))


def _fold(
    items: Iterable[Item], calls: Mapping[str, ToolCall], flags: set[str]
) -> tuple[list[Message], list[list[Item]]]:
    """Messages, and for each of the assistant its items; another speaker closes a message."""
    messages: list[Message] = []
    turns: list[list[Item]] = []
    turn: list[Item] = []
    for item in items:
        role = item.role
        if item.type == "message" and role != "assistant":
            text, images, offsets = _content(item.content)
            message = Message(role, text, images, None, (), None, None, offsets)  # type: ignore[arg-type]
            if role == "developer":
                flags.add("developer_role")
        elif item.type == "function_call_output":
            text, images, offsets = _content(item.output)
            called = item.call_id or ""
            message = Message("tool", text, images, None, (), called, calls[called].name, offsets)
        else:
            turn.append(item)
            continue
        if turn:
            messages.append(_assistant(turn, calls, flags))
            turns.append(turn)
            turn = []
        messages.append(message)
    if turn:
        messages.append(_assistant(turn, calls, flags))
        turns.append(turn)
    return messages, turns


def _assistant(turn: Iterable[Item], calls: Mapping[str, ToolCall], flags: set[str]) -> Message:
    thoughts: list[str] = []
    texts: list[str] = []
    called: list[ToolCall] = []
    for item in turn:
        if item.type == "message":
            texts.append(item.content if type(item.content) is str else _content(item.content)[0])
        elif item.type == "function_call":
            called.append(calls[item.call_id or ""])
        elif thought := _thought(item):
            thoughts.append(thought)
        else:
            flags.add("reasoning_hidden")
    text = texts[0] if len(texts) == 1 else "".join(texts)
    if "think>" in text and ("<think>" in text or "</think>" in text):
        flags.add("think_in_content")
    return Message("assistant", text, (), "\n\n".join(thoughts) if thoughts else None, tuple(called))


def _is_empty(message: Message) -> bool:
    return not (message.content or message.role != "assistant" or message.tool_calls or message.reasoning_content)


def _recorded(turns: Iterable[Sequence[Item]]) -> tuple[RecordedTurn, ...]:
    """Token ids of every turn, or of none: half a record cannot be trained on."""
    recorded = []
    for turn in turns:
        held = [item for item in turn if item.generation_token_ids]
        if len(held) != 1:
            return ()
        prompt, generated, log_probs = (
            held[0].prompt_token_ids,
            held[0].generation_token_ids,
            held[0].generation_log_probs,
        )
        if not prompt or generated is None or log_probs is None or len(generated) != len(log_probs):
            return ()
        recorded.append(RecordedTurn(prompt, generated, log_probs))
    return tuple(recorded)


def _content(content: str | list[Part] | None) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    if type(content) is str:
        return content, (), ()
    if not content:
        return "", (), ()
    if len(content) == 1 and content[0].text is not None and content[0].type != "input_image":  # type: ignore[union-attr]
        return content[0].text, (), ()  # type: ignore[union-attr]
    texts: list[str] = []
    images: list[str] = []
    offsets: list[int] = []
    length = 0
    for part in content:
        assert isinstance(part, Part)
        if part.type == "input_image":
            images.append(image_url(part))
            offsets.append(length)
        else:
            text = part.text or ""
            texts.append(text)
            length += len(text)
    return "".join(texts), tuple(images), tuple(offsets) if any(offsets) else ()


def _thought(item: Item) -> str:
    texts = [part.text for part in item.summary or () if part.text]
    if item.content:
        texts += [part.text for part in item.content if isinstance(part, Part) and part.text]
    return texts[0] if len(texts) == 1 else "\n\n".join(texts)
