"""What a rollout is worth, looked at alone: is its reward a measurement, is its completion whole, is it good."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from .record import Rollout

FRACTIONAL_THRESHOLD = 0.8
CAP_PER_TASK = 4
"""Most distinct completions of one task that are learned from, where the user names no other number."""

_THINK_TAGS = re.compile(r"</?think>")


def measured(rollout: Rollout) -> bool:
    """Whether the reward is a valid, finite measurement."""
    return rollout.reward is not None and math.isfinite(rollout.reward) and not rollout.masked


def unfit(rollout: Rollout, *, keep_truncated: bool = False) -> str:
    """The first reason why a rollout should not be learned from whatever its reward, or `""`.

    Args:
        rollout (`Rollout`): The rollout.
        keep_truncated (`bool`, *optional*, defaults to `False`): Let incomplete responses pass.

    Returns:
        `str`: `reward_missing`, `reward_not_finite`, `masked`, `truncated`, `ends_in_reasoning`, `unbalanced_think` or
        `""`.
    """
    if rollout.reward is None:
        return "reward_missing"
    if not math.isfinite(rollout.reward):
        return "reward_not_finite"
    if rollout.masked:
        return "masked"
    if rollout.truncated and not keep_truncated:
        return "truncated"
    return fault(rollout)


def fault(rollout: Rollout) -> str:
    """What is wrong with a completion as such: `ends_in_reasoning`, `unbalanced_think` or `""`."""
    last = rollout.completion[-1]
    if last.role != "assistant":
        last = next(message for message in reversed(rollout.completion) if message.role == "assistant")
    if not last.tool_calls:
        answer = last.content.rpartition("</think>")[2] if "think_in_content" in rollout.flags else last.content
        if not answer or answer.isspace():
            return "ends_in_reasoning"
    tagged = "think_in_content" in rollout.flags
    if tagged and any(not _balanced(message.content) for message in rollout.completion if message.role == "assistant"):
        return "unbalanced_think"
    return ""


def default_threshold(rewards: Iterable[float]) -> tuple[float | None, str]:
    """The lowest reward that counts as good when the user names none.

    Args:
        rewards (`Iterable[float]`): Finite, valid rewards; distinct values suffice.

    Returns:
        The threshold, `None` where no rule applies, and a sentence that says why.
    """
    values = set(rewards)
    if not values:
        return None, "no rollout has a valid reward"
    low, high = min(values), max(values)
    # The best possible value, not the best seen: in a file of failures only, a failure is not good.
    if values <= {0.0, 1.0} or values <= {-1.0, 1.0}:
        return 1.0, "rewards are binary: only the highest is good"
    if low >= 0.0 and high <= 1.0:
        return FRACTIONAL_THRESHOLD, f"rewards lie within 0 and 1: {FRACTIONAL_THRESHOLD} and more is good"
    if len(values) == 2:
        return high, f"rewards are binary ({low:g} and {high:g}): only the highest is good"
    if low == high:
        return None, f"every reward is {low:g}: whether that is good is not for gymtrl to say"
    return None, f"rewards reach from {low:g} to {high:g}: which of them are good is not for gymtrl to say"


def _balanced(content: str) -> bool:
    """Every `<think>` is closed before the next opens, and nothing closes that was not opened."""
    open_now = False
    for tag in _THINK_TAGS.findall(content):
        if (tag == "<think>") == open_now:
            return False
        open_now = not open_now
    return not open_now
