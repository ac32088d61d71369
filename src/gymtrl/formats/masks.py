"""The one engine that turns examples into token ids and labels: only what the policy produced carries loss.

Three routes, in this order; the first whose row passes every check wins:

1. `recorded`: the token ids that were recorded while the policy worked;
2. `template`: the messages rendered through a template that marks the assistant's part;
3. `prefixes`: the messages rendered turn by turn, for templates that mark nothing.

Labels start where the generation prompt ends and stop with the token that ends the turn: exactly what the model has to
generate. Headers, and the line break that some templates put after a turn, are outside. Of a rendered row, what stands
before each trained turn is what a server would send: the model's own template with its generation prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gymtrl.formats.chats import Chat, texts_of, to_chat
from gymtrl.formats.checks import (
    IGNORED,
    Refusal,
    Route,
    Tokenized,
    check_row,
    end_problem,
    labels_of,
    lost_text,
    turn_problem,
)
from gymtrl.formats.example import Example, holds_images, without_reasoning
from gymtrl.formats.images import Expanded, expand
from gymtrl.formats.recorded import read_recorded
from gymtrl.formats.settings import Reasoning
from gymtrl.formats.spans import Span, encode_all
from gymtrl.formats.templates import RENDER_ERRORS, ModelTemplate

Recorded = Literal["auto", "never", "only"]

NOT_PRESERVING = "template_not_prefix_preserving"


@dataclass(frozen=True)
class _Rendering:
    """A rendered example: its text and, for each trained turn, the characters that the model has to produce.

    With a processor there is also what that makes of the text.
    """

    text: str
    spans: tuple[Span, ...]
    route: Route
    flags: tuple[str, ...] = ()
    expanded: Expanded | None = None


def tokenize(
    example: Example, template: ModelTemplate, *, reasoning: Reasoning = "keep", recorded: Recorded = "auto"
) -> Tokenized | Refusal:
    """Makes ids and labels of one example, as `tokenize_all`."""
    return tokenize_all([example], template, reasoning=reasoning, recorded=recorded)[0]


def tokenize_all(
    examples: Sequence[Example],
    template: ModelTemplate,
    *,
    reasoning: Reasoning = "keep",
    recorded: Recorded = "auto",
    cut_ok: bool = False,
) -> list[Tokenized | Refusal]:
    """Makes ids and labels of examples, each as one row.

    Args:
        examples (`Sequence[Example]`): With at least one assistant message in each completion; tokenized together.
        template (`ModelTemplate`): Of the model that will be trained.
        reasoning (`str`, *optional*, defaults to `"keep"`): `keep` refuses rows whose reasoning the template drops,
            `drop` takes all reasoning out beforehand, `template` leaves it to the template.
        recorded (`str`, *optional*, defaults to `"auto"`): `auto` takes recorded ids where they fit and renders else,
            `never` renders, `only` refuses what recorded ids do not fit.
        cut_ok (`bool`, *optional*, defaults to `False`): Take examples whose last turn was cut off where recorded ids
            fit: these show no turn end that was not there. Rendered they never are.

    Returns:
        `list[Tokenized | Refusal]`: For each, ids and labels of the same length, nothing cut; or why it cannot be
        trained on.
    """
    made = [_render(example, template, reasoning, recorded, cut_ok) for example in examples]
    rendered = [entry for entry in made if isinstance(entry, _Rendering)]
    texts = [(found.text, found.spans) for entry in rendered for found in (entry.expanded or entry,)]
    encoded = iter(encode_all(texts, template))
    return [
        _finish(entry, next(encoded), example, template, reasoning) if isinstance(entry, _Rendering) else entry
        for entry, example in zip(made, examples, strict=True)
    ]


def tokenize_prompt(example: Example, template: ModelTemplate, *, reasoning: Reasoning = "keep") -> list[int] | Refusal:
    """Token ids of what is sent to a model that is to answer the example's prompt, or why that cannot be shown."""
    asked = dataclasses.replace(example, completion=(), recorded=(), truncated=False)
    if reasoning == "drop":
        asked = without_reasoning(asked)
    unfit = _unfit(asked, template) or _without_tools(asked, template)
    if unfit is not None:
        return unfit
    chat = to_chat(asked.prompt, developer_as_system=not template.developer)
    try:
        (text,) = template.render([chat], list(asked.tools) or None, template=template.stock, generation_prompt=True)
    except RENDER_ERRORS as error:
        return _template_error(error)
    return lost_text(text, asked) or _lost_characters(text, template) or template.encode(text)


def loss_mask(tokens: Tokenized) -> list[int]:
    """1 for every token that carries loss, 0 for all others."""
    return [int(label != IGNORED) for label in tokens.labels]


def _render(
    example: Example, template: ModelTemplate, reasoning: Reasoning, recorded: Recorded, cut_ok: bool
) -> _Rendering | Tokenized | Refusal:
    unfit = _unfit(example, template, cut_ok=cut_ok)
    if unfit is not None:
        return unfit
    flags: list[str] = []
    if reasoning == "drop":
        given, example = example, without_reasoning(example)
        if given.recorded and not example.recorded:
            flags.append("recorded_ids_unused:reasoning_dropped")
    if recorded != "never" and example.recorded:
        found = _recorded(example, template)
        problem = found if isinstance(found, Refusal) else check_row(found, example, template, "template")
        if problem is None or recorded == "only":
            return problem or found
        flags.append(f"recorded_ids_unused:{problem.reason}")
    if example.truncated:
        return _cut_off()
    toolless = _without_tools(example, template)
    if toolless is not None:
        return toolless
    if not template.developer and any(m.role == "developer" for m in example.messages):
        flags.append("developer_as_system")
    first: Refusal | None = None
    for rendering in _renderings(example, template):
        problem = (
            rendering if isinstance(rendering, Refusal) else _text_problem(rendering, example, template, reasoning)
        )
        if isinstance(rendering, _Rendering) and problem is None:
            return _with_images(dataclasses.replace(rendering, flags=(*flags, *rendering.flags)), example, template)
        first = first or problem
    assert first is not None
    return first


def _recorded(example: Example, template: ModelTemplate) -> Tokenized | Refusal:
    if template.processor is not None:
        return Refusal("recorded_images", "the processor makes the tokens of a dataset with images")
    return read_recorded(example, template)


def _with_images(rendering: _Rendering, example: Example, template: ModelTemplate) -> _Rendering | Refusal:
    if template.processor is None:
        return rendering
    expanded = expand(rendering.text, rendering.spans, example.messages, template.processor)
    return expanded if isinstance(expanded, Refusal) else dataclasses.replace(rendering, expanded=expanded)


def _unfit(example: Example, template: ModelTemplate, *, cut_ok: bool = False) -> Refusal | None:
    if example.truncated and not cut_ok:
        return _cut_off()
    if template.processor is None and holds_images(example):
        return Refusal("images_in_text_model", "the row holds images")
    if not example.prompt:
        return Refusal("no_prompt", "the row has no message before the policy's first output")
    return None


def _without_tools(example: Example, template: ModelTemplate) -> Refusal | None:
    messages = example.messages
    uses = bool(example.tools) or any(m.role == "tool" or m.tool_calls for m in messages)
    if uses and not template.tools:
        return Refusal("template_without_tools", "the row has tools; the model's chat template cannot show them")
    return None


def _renderings(example: Example, template: ModelTemplate) -> Iterator[_Rendering | Refusal]:
    chat = to_chat(example.messages, developer_as_system=not template.developer)
    tools = list(example.tools) or None
    positions = example.turn_positions()
    try:
        prompts = _prompts(chat, tools, positions, template)
    except RENDER_ERRORS as error:
        yield _template_error(error)
        return
    routes: list[Callable[[], _Rendering | Refusal]] = [lambda: _by_prefixes(chat, tools, positions, prompts, template)]
    if template.marked is not None:
        routes.insert(0, lambda: _by_marks(chat, tools, prompts, template))
    for route in routes:
        try:
            yield route()
        except RENDER_ERRORS as error:
            yield _template_error(error)


def _prompts(
    chat: Chat, tools: list[dict[str, Any]] | None, positions: list[int], template: ModelTemplate
) -> list[tuple[str, ...]]:
    """Renders, for each trained turn, what the model gets before it: with thinking switched off, and as usual."""
    heads = [chat[:i] for i in positions]
    usual = template.render(heads, tools, template=template.stock, generation_prompt=True)
    if "enable_thinking" not in template.stock:
        return [(prompt,) for prompt in usual]
    # Where the empty tags of switched-off thinking stand before an answer, the policy has not produced them.
    off = template.render(heads, tools, template=template.stock, generation_prompt=True, enable_thinking=False)
    return [pair if len(pair[0]) > len(pair[1]) else pair[1:] for pair in zip(off, usual, strict=True)]


def _by_marks(
    chat: Chat, tools: list[dict[str, Any]] | None, prompts: list[tuple[str, ...]], template: ModelTemplate
) -> _Rendering | Refusal:
    text, marks = template.render_marked(chat, tools)
    spans, off = [], False
    for candidates in prompts:
        # What is marked may reach back into the header, or hold more than the trained turns; the prompt decides.
        begin = _length_of_prefix(text, candidates)
        mark = next((mark for mark in marks if begin is not None and mark[0] <= begin < mark[1]), None)
        if begin is None or mark is None:
            return _not_preserving()
        spans.append((begin, mark[1]))
        off = off or begin != len(candidates[-1])
    return _closed(text, spans, "template", template, off=off)


def _by_prefixes(
    chat: Chat,
    tools: list[dict[str, Any]] | None,
    positions: list[int],
    prompts: list[tuple[str, ...]],
    template: ModelTemplate,
) -> _Rendering | Refusal:
    *heads, text = template.render([*(chat[: i + 1] for i in positions), chat], tools, template=template.stock)
    spans, off = [], False
    for candidates, head in zip(prompts, heads, strict=True):
        begin = _length_of_prefix(text, candidates)
        if begin is None:
            return _not_preserving()
        # Some templates write something else behind a turn once others follow; then its first end mark ends it. What
        # stands up to there has to be the same without the others: it may be a tool's answer, put into the turn.
        ends = [at + len(mark) for mark in template.end_marks if (at := text.find(mark, begin)) >= 0]
        if text.startswith(head):
            spans.append((begin, len(head)))
        elif ends and head.startswith(text[: min(ends)]):
            spans.append((begin, min(ends)))
        else:
            return _not_preserving()
        off = off or begin != len(candidates[-1])
    return _closed(text, spans, "prefixes", template, off=off)


def _length_of_prefix(text: str, candidates: tuple[str, ...]) -> int | None:
    return next((len(candidate) for candidate in candidates if text.startswith(candidate)), None)


def _closed(text: str, spans: list[Span], route: Route, template: ModelTemplate, *, off: bool) -> _Rendering | Refusal:
    closed = [found for span in spans if (found := _close(text, span, template)) is not None]
    if len(closed) < len(spans):
        return Refusal("turn_end_missing", "the template writes no token that ends an assistant turn")
    return _Rendering(text, tuple(closed), route, ("thinking_off",) if off else ())


def _close(text: str, span: Span, template: ModelTemplate) -> Span | None:
    """Ends a turn's characters with the token that ends the turn, where the template shows one."""
    start, end = span
    # Several may follow each other. Side by side they end the turn together; behind a line break stands one that the
    # template adds for itself, and the model has stopped before it.
    last, position = None, end
    while True:
        stop = start + len(text[start:position].rstrip())
        mark = next((mark for mark in template.end_marks if text.endswith(mark, start, stop)), None)
        if mark is None:
            break
        if last is None or stop < position:
            last = stop
        position = stop - len(mark)
    if last is not None:
        return start, last
    following = [mark for mark in template.end_marks if text.startswith(mark, end)]
    return (start, end + len(following[0])) if following else None


def _text_problem(
    rendering: _Rendering, example: Example, template: ModelTemplate, reasoning: Reasoning
) -> Refusal | None:
    for (start, end), position in zip(rendering.spans, example.turn_positions(), strict=True):
        message = example.messages[position]
        trained = rendering.text[start:end]
        body = trained
        while mark := next((mark for mark in template.end_marks if body.endswith(mark)), ""):
            body = body.removesuffix(mark)
        if any(mark in body for mark in template.end_marks):
            return Refusal("turn_end_inside", "the token that ends a turn stands inside an assistant turn")
        if template.header and trained.startswith(template.header):
            # The server's prompt ends without a header, and the template writes one once there is an answer.
            return _not_preserving()
        if message.tool_calls and rendering.route == "template":
            problem = _foreign_text(rendering.text[: end - len(mark)], start, example, position, template)
            if problem is not None:
                return problem
        words = template.words(trained)
        problem = turn_problem(words, message, template.scaffolds, reasoning)
        if problem is not None:
            return problem
    return lost_text(rendering.text, example) or _lost_characters(rendering.text, template)


def _lost_characters(text: str, template: ModelTemplate) -> Refusal | None:
    lost = template.lost_characters(text) if template.lossless else []
    if not lost:
        return None
    named = ", ".join(f"U+{ord(character):04X}" for character in lost[:5])
    return Refusal("character_lost", f"the tokenizer has no tokens for {named}")


def _foreign_text(text: str, start: int, example: Example, position: int, template: ModelTemplate) -> Refusal | None:
    """Looks for later messages in a turn of calls: what is marked may hold the tools' answers."""
    later = [said.strip() for m in example.messages[position + 1 :] for said in texts_of(m)]
    if not any(said and said in text[start:] for said in later):
        return None
    assert template.marked is not None
    chat = to_chat(example.messages[: position + 1], developer_as_system=not template.developer)
    try:
        (alone,) = template.render([chat], list(example.tools) or None, template=template.marked)
    except RENDER_ERRORS as error:
        return _template_error(error)
    if alone.startswith(text):
        return None
    return Refusal("loss_text_differs", "the trained tokens hold the text of a message that follows the turn")


def _finish(
    rendering: _Rendering,
    encoded: tuple[list[int], tuple[Span, ...]] | None,
    example: Example,
    template: ModelTemplate,
    reasoning: Reasoning,
) -> Tokenized | Refusal:
    if encoded is None:
        return _not_preserving()
    ids, spans = encoded
    if rendering.expanded is not None and ids != rendering.expanded.ids:
        return Refusal(
            "processor_tokens_differ", "the model's processor makes other tokens where a turn begins or ends"
        )
    text = rendering.text if rendering.expanded is not None else None
    found = Tokenized(ids, labels_of(ids, spans), spans, rendering.route, rendering.flags, text)
    for start, end in spans:
        problem = end_problem(ids[start:end], template.end_ids)
        if problem is not None:
            return problem
    # The words were compared in the text; a tokenizer that changes text has to show them in the tokens as well.
    problem = None if template.lossless else check_row(found, example, template, reasoning)
    return problem or found


def _cut_off() -> Refusal:
    return Refusal("truncated", "the last turn was cut off by a limit; rendering it would teach a false turn end")


def _template_error(error: Exception) -> Refusal:
    return Refusal("template_error", f"the chat template refuses the row: {type(error).__name__}: {error}"[:300])


def _not_preserving() -> Refusal:
    return Refusal(
        NOT_PRESERVING,
        "rendered whole, the row is not what the model sees turn by turn: template or tokenizer rewrites earlier turns",
    )
