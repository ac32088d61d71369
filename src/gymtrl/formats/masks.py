"""The one engine that turns a rollout into token ids and labels: only what the policy produced carries loss.

Three routes, in this order; the first whose row passes every check wins:

1. `recorded`: the token ids that were recorded while the policy worked;
2. `template`: the messages rendered through a template that marks the assistant's part;
3. `prefixes`: the messages rendered turn by turn, for templates that mark nothing.

Labels start where the generation prompt ends and stop with the token that ends the turn: exactly what the model has to
generate. Headers, and the line break that some templates put after a turn, are outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gymtrl.formats.checks import IGNORED, Refusal, Tokenized, check_row, turn_problem
from gymtrl.formats.templates import RENDER_ERRORS, Chat, ModelTemplate, to_chat
from gymtrl.rollouts.record import Message, Rollout

Span = tuple[int, int]


@dataclass(frozen=True)
class _Rendering:
    """A rendered row: its text and, for each trained turn, the characters that the model has to produce."""

    text: str
    spans: tuple[Span, ...]


def tokenize(rollout: Rollout, template: ModelTemplate, *, use_recorded: bool = True) -> Tokenized | Refusal:
    """Makes ids and labels of one rollout.

    Args:
        rollout (`Rollout`): With at least one assistant message in its completion.
        template (`ModelTemplate`): Of the model that will be trained.
        use_recorded (`bool`, *optional*, defaults to `True`): Take recorded ids where they fit.

    Returns:
        `Tokenized`: Ids and labels of the same length; nothing is cut. Or `Refusal`: why the row cannot be trained on.
    """
    unfit = _unfit(rollout)
    if unfit is not None:
        return unfit
    flags: list[str] = []
    if use_recorded and rollout.recorded:
        found = _checked(_from_recorded(rollout, template), rollout, template)
        if isinstance(found, Tokenized):
            return found
        flags.append(f"recorded_ids_unused:{found.reason}")
    if not template.tools and _uses_tools(rollout):
        return Refusal("template_without_tools", "the row has tools; the model's chat template cannot show them")
    if not template.developer and any(m.role == "developer" for m in (*rollout.prompt, *rollout.completion)):
        flags.append("developer_as_system")
    first: Refusal | None = None
    routes: list[Callable[[Rollout, ModelTemplate], Tokenized | Refusal]] = [_by_prefixes]
    if template.marked is not None:
        routes.insert(0, _by_marks)
    for route in routes:
        found = _checked(route(rollout, template), rollout, template)
        if isinstance(found, Tokenized):
            return dataclasses.replace(found, flags=(*flags, *found.flags))
        first = first or found
    assert first is not None
    return first


def _unfit(rollout: Rollout) -> Refusal | None:
    if rollout.truncated:
        return Refusal("truncated", "the last turn was cut off by a limit; rendering it would teach a false turn end")
    if any(message.images for message in (*rollout.prompt, *rollout.completion)):
        return Refusal("images_in_text_model", "the row holds images")
    if not rollout.prompt:
        return Refusal("no_prompt", "the row has no message before the policy's first output")
    return None


def _uses_tools(rollout: Rollout) -> bool:
    messages = (*rollout.prompt, *rollout.completion)
    return bool(rollout.tools) or any(m.role == "tool" or m.tool_calls for m in messages)


def _checked(found: Tokenized | Refusal, rollout: Rollout, template: ModelTemplate) -> Tokenized | Refusal:
    if isinstance(found, Refusal):
        return found
    return check_row(found, rollout, template) or found


def _from_recorded(rollout: Rollout, template: ModelTemplate) -> Tokenized | Refusal:
    turns = _turns(rollout)
    if len(rollout.recorded) != len(turns):
        return Refusal("recorded_turns_differ", f"{len(rollout.recorded)} recorded calls, {len(turns)} assistant turns")
    vocabulary = len(template.tokenizer)
    ids: list[int] = []
    spans: list[Span] = []
    for call, message in zip(rollout.recorded, turns, strict=True):
        prompt, generation = list(call.prompt_token_ids), list(call.generation_token_ids)
        if not generation or any(not 0 <= token < vocabulary for token in (*prompt, *generation)):
            return Refusal("recorded_foreign_ids", "recorded ids are not of this tokenizer")
        if prompt[: len(ids)] != ids or len(prompt) <= len(ids):
            return Refusal("recorded_not_prefix", "a recorded prompt does not continue the call before it")
        if spans and ids[-1] not in template.end_ids and prompt[len(ids)] in template.end_ids:
            # The server stripped the turn's end from what it returned; the next prompt proves that it was there.
            spans[-1] = (spans[-1][0], len(ids) + 1)
        ids = prompt + generation
        spans.append((len(prompt), len(ids)))
        problem = turn_problem(template.decode(generation), message, template.scaffolds)
        if problem is not None:
            return Refusal("recorded_text_differs", problem.detail)
    if ids[-1] not in template.end_ids:
        return Refusal("recorded_turn_end_missing", "the recorded ids stop before the end of the last turn")
    return Tokenized(ids, _labels(ids, spans), tuple(spans), "recorded")


def _by_marks(rollout: Rollout, template: ModelTemplate) -> Tokenized | Refusal:
    assert template.marked is not None
    chat, tools = _chat(rollout, template)
    try:
        text, marks = _render_marked(chat, tools, template)
        prompts = _prompts(chat, tools, rollout, template, template.marked)
    except RENDER_ERRORS as error:
        return _template_error(error)
    spans = []
    for candidates in prompts:
        # What is marked may reach back into the header, or hold more than the trained turns; the prompt decides.
        begin = _length_of_prefix(text, candidates)
        mark = next((mark for mark in marks if begin is not None and mark[0] <= begin < mark[1]), None)
        if begin is None or mark is None:
            return _not_preserving()
        spans.append((begin, mark[1]))
    found = _encode(_Rendering(text, tuple(spans)), template, "template")
    if isinstance(found, Tokenized) and _differs_from_inference(text, spans, chat, tools, rollout, template):
        return dataclasses.replace(found, flags=("prompt_differs_from_inference",))
    return found


def _differs_from_inference(
    text: str,
    spans: list[Span],
    chat: Chat,
    tools: list[dict[str, Any]] | None,
    rollout: Rollout,
    template: ModelTemplate,
) -> bool:
    """Whether a server, which renders with the stock template, would put something else before a trained turn.

    A training template may keep what the stock one strips from earlier turns, such as their reasoning.
    """
    if template.marked == template.stock:
        return False
    try:
        prompts = _prompts(chat, tools, rollout, template, template.stock)
    except RENDER_ERRORS:
        return True
    return any(text[:begin] not in candidates for (begin, _), candidates in zip(spans, prompts, strict=True))


def _by_prefixes(rollout: Rollout, template: ModelTemplate) -> Tokenized | Refusal:
    chat, tools = _chat(rollout, template)
    try:
        text = template.render(chat, tools, template=template.stock)
        prompts = _prompts(chat, tools, rollout, template, template.stock)
        heads = [template.render(chat[: i + 1], tools, template=template.stock) for i in _positions(rollout)]
    except RENDER_ERRORS as error:
        return _template_error(error)
    spans = []
    for candidates, head in zip(prompts, heads, strict=True):
        begin = _length_of_prefix(head, candidates)
        if begin is None or not text.startswith(head):
            return _not_preserving()
        spans.append((begin, len(head)))
    return _encode(_Rendering(text, tuple(spans)), template, "prefixes")


def _encode(rendering: _Rendering, template: ModelTemplate, route: Any) -> Tokenized | Refusal:
    text = rendering.text
    closed = [_close(text, span, template) for span in rendering.spans]
    if any(span is None for span in closed):
        return Refusal("turn_end_missing", "the template writes no token that ends an assistant turn")
    cuts = [0, *(position for span in closed if span is not None for position in span), len(text)]
    ids: list[int] = []
    spans: list[Span] = []
    # Piece by piece, since the model generates its part after a prompt that was tokenized alone: a line break at the
    # head of an answer must not melt into the one that ends the header.
    for number, (start, end) in enumerate(pairwise(cuts)):
        piece = template.encode(text[start:end])
        if number % 2:
            spans.append((len(ids), len(ids) + len(piece)))
        ids.extend(piece)
    whole = template.encode(text)
    if ids != whole and any(
        ids[: span[0]] != template.encode(text[:start]) for span, start in zip(spans, cuts[1:-1:2], strict=True)
    ):
        return _not_preserving()
    return Tokenized(ids, _labels(ids, spans), tuple(spans), route)


def _close(text: str, span: Span, template: ModelTemplate) -> Span | None:
    """Ends a turn's characters with the token that ends the turn, where the template shows one."""
    start, end = span
    marks = [template.decode([token], skip_special=False) for token in template.end_ids]
    # Several may follow each other. Side by side they end the turn together; behind a line break stands one that the
    # template adds for itself, and the model has stopped before it.
    last, position = None, end
    while True:
        stop = start + len(text[start:position].rstrip())
        mark = next((mark for mark in marks if text.endswith(mark, start, stop)), None)
        if mark is None:
            break
        if last is None or stop < position:
            last = stop
        position = stop - len(mark)
    if last is not None:
        return start, last
    following = [mark for mark in marks if text.startswith(mark, end)]
    return (start, end + len(following[0])) if following else None


def _render_marked(chat: Chat, tools: list[dict[str, Any]] | None, template: ModelTemplate) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        conversations=[chat],
        tools=tools,
        chat_template=template.marked,
        return_assistant_tokens_mask=True,
        **template.tokenizer.special_tokens_map,
    )
    return texts[0], [(start, end) for start, end in marks[0]]


def _chat(rollout: Rollout, template: ModelTemplate) -> tuple[Chat, list[dict[str, Any]] | None]:
    chat = to_chat((*rollout.prompt, *rollout.completion), developer_as_system=not template.developer)
    return chat, list(rollout.tools) or None


def _prompts(
    chat: Chat, tools: list[dict[str, Any]] | None, rollout: Rollout, template: ModelTemplate, source: str
) -> list[tuple[str, str]]:
    """Renders, for each trained turn, what the model gets before it: as usual, and with thinking switched off."""
    return [
        (
            template.render(chat[:i], tools, template=source, generation_prompt=True),
            template.render(chat[:i], tools, template=source, generation_prompt=True, enable_thinking=False),
        )
        for i in _positions(rollout)
    ]


def _length_of_prefix(text: str, candidates: tuple[str, ...]) -> int | None:
    return next((len(candidate) for candidate in candidates if text.startswith(candidate)), None)


def _positions(rollout: Rollout) -> list[int]:
    offset = len(rollout.prompt)
    return [offset + i for i, message in enumerate(rollout.completion) if message.role == "assistant"]


def _turns(rollout: Rollout) -> list[Message]:
    return [message for message in rollout.completion if message.role == "assistant"]


def _labels(ids: list[int], spans: list[Span]) -> list[int]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def _template_error(error: Exception) -> Refusal:
    return Refusal("template_error", f"the chat template refuses the row: {type(error).__name__}: {error}"[:300])


def _not_preserving() -> Refusal:
    return Refusal(
        "template_not_prefix_preserving",
        "rendered whole, the row is not what the model sees turn by turn: template or tokenizer rewrites earlier turns",
    )
