"""What a rollout took and how the policy went about it, as numbers that are compared task by task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from gymtrl.comparison.tool_errors import is_tool_error
from gymtrl.rollouts.messages import text_length
from gymtrl.rollouts.quality import fault
from gymtrl.rollouts.record import Message, Rollout

COSTS = ("input tokens", "output tokens", "turns", "characters", "truncated", "tool calls", "tool errors")
FORMS = ("reasoning", "boxed answers", "code blocks", "JSON answers", "answer tags")
"""Forms of an answer that verifiers look for."""
HABITS = (
    "no sound chat",
    "no answer",
    "failed calls",
    "unknown tools",
    "calls as text",
    "repeated turns",
    "repeated text",
    "chat markers",
    *FORMS,
)
"""0 or 1, but for failed calls and unknown tools, which are shares of a rollout's calls; without calls none is unknown,
and of failed ones nothing is known."""
MEASURES = (*COSTS, *HABITS)

_SPECIAL = re.compile(r"<\|[a-zA-Z_]+\|>")
_TAIL, _FEW = 40, 12  # characters
_LOOPS = 4  # times that the end of a text stands in it
_SAME_TURNS = 3
_UNKNOWN = (math.nan,) * (len(HABITS) - 1)


def measures(rollout: Rollout) -> tuple[float, ...]:
    """What is known of a rollout, in the order of `MEASURES`; NaN where it is not known or there is nothing to count.

    Args:
        rollout (`Rollout`): Without a completion where its answer is no sound chat.
    """
    sent = math.nan if rollout.input_tokens is None else rollout.input_tokens
    made = math.nan if rollout.output_tokens is None else rollout.output_tokens
    completion, calls, cut = rollout.completion, rollout.n_tool_calls, rollout.truncated
    if not completion:
        return sent, made, math.nan, math.nan, cut, math.nan, math.nan, 1.0, *_UNKNOWN
    errors, failed, unknown, repeated = 0, math.nan, 0.0, False
    if calls:
        errors = sum([message.role == "tool" and is_tool_error(message.content) for message in completion])
        failed, unknown = errors / calls, _unknown_calls(rollout) / calls
    if rollout.turns >= _SAME_TURNS:
        repeated = _turns_repeat(completion)
    thought = "think_in_content" in rollout.flags
    written = loops = marked = False
    answer = ""
    for message in completion:
        if message.role == "assistant":
            answer = message.content
            loops = loops or _loops(answer)
            marked = marked or _marked(answer)
            if rollout.tools:
                written = written or _calls(answer)
            if message.reasoning_content:
                thought, loops = True, loops or _loops(message.reasoning_content)
    if thought:
        answer = answer.rpartition("</think>")[2]
    return (
        sent,
        made,
        rollout.turns,
        text_length(completion),
        cut,
        calls,
        errors,
        0.0,
        fault(rollout) == "ends_in_reasoning",
        failed,
        unknown,
        written if rollout.tools else math.nan,
        repeated,
        loops,
        marked,
        thought,
        *_forms(answer),
    )


def _forms(answer: str) -> tuple[bool, ...]:
    """Whether an answer has each form of `FORMS` but reasoning."""
    return (
        "\\" in answer and "\\boxed" in answer,
        "`" in answer and "```" in answer,
        answer.lstrip().startswith(("{", "[")),
        "<" in answer and "<answer>" in answer,
    )


def _unknown_calls(rollout: Rollout) -> int:
    """Calls of tools that the policy was not offered."""
    offered = {tool["function"].get("name") for tool in rollout.tools if isinstance(tool.get("function"), dict)}
    return sum(call.name not in offered for message in rollout.completion for call in message.tool_calls)


def _calls(text: str) -> bool:
    """Whether a call stands in the text that should have been one."""
    return (
        ("<" in text and ("<tool_call" in text or "<function" in text))
        or "[TOOL_CALLS]" in text
        or ("{" in text and '"name"' in text and ('"arguments"' in text or '"parameters"' in text))
    )


def _turns_repeat(completion: Iterable[Message]) -> bool:
    """Whether the policy made the same calls, or said the same, three times running."""
    before, times = None, 0
    for message in completion:
        if message.role != "assistant":
            continue
        now = [(call.name, call.arguments_json) for call in message.tool_calls] or message.content
        times = times + 1 if now == before else 1
        if times == _SAME_TURNS:
            return True
        before = now
    return False


def _loops(text: str) -> bool:
    """Whether a text ends in a loop: a loop goes on to where the text ends."""
    if len(text) < _LOOPS * _TAIL:
        return False
    ended = text.rstrip()
    if len(text) - len(ended) >= _LOOPS * _TAIL:
        return True
    # The last few characters of most texts stand in them once, and few are found sooner than many.
    return ended.find(ended[-_FEW:]) < len(ended) - _FEW and ended.count(ended[-_TAIL:]) >= _LOOPS


def _marked(text: str) -> bool:
    """Whether a text holds what divides the turns of a chat, or the beginning of another's turn."""
    # Most texts have no such sign, and to look for one character is quick.
    special = "<" in text and (_SPECIAL.search(text) is not None or "_of_turn>" in text or "</s>" in text)
    return special or (
        "\n" in text and ("\nuser\n" in text or "\nassistant\n" in text or "\nUser:" in text or "\nHuman:" in text)
    )
