"""Token ids that Gym recorded: the calls of one rollout put together into rows."""

from __future__ import annotations

from gymtrl.formats.checks import Refusal, Tokenized, labels_of, turn_problem
from gymtrl.formats.example import Example
from gymtrl.formats.spans import Span
from gymtrl.formats.templates import ModelTemplate


def read_recorded(example: Example, template: ModelTemplate) -> Tokenized | Refusal:
    """Puts the recorded calls together into one row.

    Args:
        example (`Example`): With recorded ids.
        template (`ModelTemplate`): Of the model that will be trained, which has to be the one that was recorded.

    Returns:
        `Tokenized`: The recorded ids with loss on what was generated. Or `Refusal`: why they cannot be used, such as
        `recorded_not_prefix` where a call does not continue the one before it.
    """
    turns = example.turns
    if len(example.recorded) != len(turns):
        return Refusal("recorded_turns_differ", f"{len(example.recorded)} recorded calls, {len(turns)} assistant turns")
    vocabulary = len(template.tokenizer)
    ids: list[int] = []
    spans: list[Span] = []
    for call, message in zip(example.recorded, turns, strict=True):
        prompt, generation = list(call.prompt_token_ids), list(call.generation_token_ids)
        if not generation or min(*prompt, *generation) < 0 or max(*prompt, *generation) >= vocabulary:
            return Refusal("recorded_foreign_ids", "recorded ids are not of this tokenizer")
        if not _continues(ids, prompt):
            return Refusal("recorded_not_prefix", "a recorded prompt does not continue the call before it")
        if spans and ids[-1] not in template.end_ids:
            # The next prompt shows an end, but templates end turns that hit a limit as well.
            return Refusal("recorded_turn_end_missing", "the recorded ids of a turn stop before its end")
        ids = prompt + generation
        spans.append((len(prompt), len(ids)))
        # What was generated was generated: whether the message shows its reasoning does not matter.
        problem = turn_problem(template.decode(generation), message, template.scaffolds, "template")
        if problem is not None:
            return Refusal("recorded_text_differs", problem.detail)
    if ids[-1] not in template.end_ids and not example.truncated:
        return Refusal("recorded_turn_end_missing", "the recorded ids stop before the end of the last turn")
    return Tokenized(ids, labels_of(ids, spans), tuple(spans), "recorded")


def by_history(example: Example) -> list[Example]:
    """Divides an example where a recorded call does not continue the one before it, as when history was rewritten.

    Args:
        example (`Example`): With recorded ids.

    Returns:
        `list[Example]`: Examples whose recorded calls each continue the call before, in order.
    """
    positions = [i for i, message in enumerate(example.completion) if message.role == "assistant"]
    if len(positions) != len(example.recorded):
        return [example]
    starts: list[int] = []
    ids: list[int] = []
    for position, call in zip(positions, example.recorded, strict=True):
        prompt = list(call.prompt_token_ids)
        if not starts or not _continues(ids, prompt):
            starts.append(position)
        ids = prompt + list(call.generation_token_ids)
    parts = []
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else len(example.completion)
        # Up to the last turn before the next part: what follows it was seen by that part only.
        stop = max(p for p in positions if p < following) + 1 if number + 1 < len(starts) else following
        parts.append(example.part(start, stop))
    return parts


def _continues(ids: list[int], prompt: list[int]) -> bool:
    return len(prompt) > len(ids) and prompt[: len(ids)] == ids
