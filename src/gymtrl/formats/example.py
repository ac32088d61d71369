"""A part of a rollout to learn from: what was sent, and what the policy answered."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from gymtrl.rollouts.record import Message, RecordedTurn, Rollout

_LEADING_THOUGHT = re.compile(r"\A\s*(?:<think>)?.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """What was sent and what came back.

    Attributes:
        prompt (`tuple[Message, ...]`): What the policy was sent, earlier turns of its own included.
        completion (`tuple[Message, ...]`): From the first turn to learn from: assistant and tool messages, and the user
            messages of a simulated user.
        tools (`tuple[dict[str, Any], ...]`): Declared tools as `{"type": "function", "function": {...}}`.
        recorded (`tuple[RecordedTurn, ...]`): Recorded token ids, one entry a turn of the completion; empty where not
            recorded.
        truncated (`bool`): The last turn was cut off by a limit.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    recorded: tuple[RecordedTurn, ...] = ()
    truncated: bool = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """Prompt and completion."""
        return (*self.prompt, *self.completion)

    @property
    def turns(self) -> list[Message]:
        """The assistant messages of the completion."""
        return [message for message in self.completion if message.role == "assistant"]

    def turn_positions(self) -> list[int]:
        """Where they stand among all messages, the prompt counted."""
        offset = len(self.prompt)
        return [offset + i for i, message in enumerate(self.completion) if message.role == "assistant"]

    def part(self, start: int, stop: int) -> Example:
        """The example of some messages of the completion, with all before them as its prompt."""
        turns = [0, *accumulate(message.role == "assistant" for message in self.completion)]
        return Example(
            prompt=(*self.prompt, *self.completion[:start]),
            completion=self.completion[start:stop],
            tools=self.tools,
            recorded=self.recorded[turns[start] : turns[stop]] if self.recorded else (),
            truncated=self.truncated and turns[stop] == turns[-1],
        )


def whole(rollout: Rollout) -> Example:
    """All of a rollout."""
    return Example(rollout.prompt, rollout.completion, rollout.tools, rollout.recorded, rollout.truncated)


def by_query(example: Example) -> list[Example]:
    """One example for each user message that the policy answered: templates drop reasoning of earlier queries."""
    parts: list[Example] = []
    start = 0
    for stop in range(len(example.completion) + 1):
        ends = stop == len(example.completion) or example.completion[stop].role not in ("assistant", "tool")
        if ends:
            if any(message.role == "assistant" for message in example.completion[start:stop]):
                parts.append(example.part(start, stop))
            start = stop + 1
    return parts


def by_call(example: Example) -> list[Example]:
    """One example for each call of the model, with exactly what it was sent as its prompt."""
    positions = [i for i, message in enumerate(example.completion) if message.role == "assistant"]
    return [example.part(position, position + 1) for position in positions]


def holds_images(example: Example | Rollout) -> bool:
    """Whether one of the messages holds an image."""
    return any(message.images for message in (*example.prompt, *example.completion))


def without_reasoning(example: Example) -> Example:
    """The example with the reasoning of all turns taken out; as it is where there is none."""
    prompt, completion = (tuple(map(_unthinking, side)) for side in (example.prompt, example.completion))
    if (prompt, completion) == (example.prompt, example.completion):
        return example
    return replace(example, prompt=prompt, completion=completion, recorded=())


def replace_reasoning(message: Message, content: str | None = None) -> Message:
    """The message without its reasoning, and with another text where one is given."""
    text = message.content if content is None else content
    if message.reasoning_content is None and text == message.content:
        return message
    calls, answers = message.tool_calls, message.tool_call_id
    return Message(message.role, text, message.images, None, calls, answers, message.name, message.image_offsets)


def _unthinking(message: Message) -> Message:
    """The message without its reasoning, and without a block of think tags that its text begins with."""
    thinks = message.role == "assistant" and "</think>" in message.content
    return replace_reasoning(message, _LEADING_THOUGHT.sub("", message.content) if thinks else None)
