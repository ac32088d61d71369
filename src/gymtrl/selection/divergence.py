"""Where two rollouts of a task part: the first message that the policy wrote differently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from gymtrl.rollouts.codec import exact_json
from gymtrl.rollouts.keys import plain_message
from gymtrl.rollouts.record import Message, Rollout


def first_divergence(chosen: Rollout, rejected: Rollout) -> int | str:
    """Finds the first message of the completions that differs.

    Arguments of calls are compared as parsed, their ids are not looked at.

    Args:
        chosen, rejected (`Rollout`): Two rollouts.

    Returns:
        `int` or `str`: Its index, where both sides have an assistant message there. Else why there is none:
            `prompt_differs` (prompt or tools), `same_completion`, or `diverges_in_environment` (what was done is the
            same up to where a tool, a user or the end of the episode made the difference).
    """
    if _plain(chosen.prompt) != _plain(rejected.prompt) or exact_json(chosen.tools) != exact_json(rejected.tools):
        return "prompt_differs"
    for index, (left, right) in enumerate(zip_longest(chosen.completion, rejected.completion)):
        if left is None or right is None:
            return "diverges_in_environment"
        if _plain([left]) != _plain([right]):
            ours = left.role == right.role == "assistant"
            return index if ours else "diverges_in_environment"
    return "same_completion"


def _plain(messages: Sequence[Message]) -> bytes:
    return exact_json([plain_message(message) for message in messages])
