"""What every row must satisfy before it is written: the loss is on the assistant's words and on nothing else."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gymtrl.formats.chats import argument_texts, squeeze, texts_of
from gymtrl.formats.example import Example
from gymtrl.formats.settings import Reasoning
from gymtrl.formats.templates import ModelTemplate
from gymtrl.rollouts.record import Message

IGNORED = -100
"""Label of a token that carries no loss, as PyTorch's cross entropy takes it."""

Route = Literal["recorded", "template", "prefixes"]

_THINKING = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_THINK_TAGS = re.compile(r"</?think(?:ing)?>")


@dataclass(frozen=True)
class Tokenized:
    """The tokens of a row.

    Attributes:
        input_ids (`list[int]`): The whole conversation, shape (tokens,).
        labels (`list[int]`): Same length; the id where the token carries loss, else -100. Not shifted.
        spans (`tuple[tuple[int, int], ...]`): Half-open token ranges that carry loss, one an assistant turn.
        route (`str`): How the tokens came about: `recorded`, `template` or `prefixes`.
        flags (`tuple[str, ...]`): Remarks such as `developer_as_system`.
        text (`str`, *optional*): What a model's processor makes the tokens of, together with the images; `None` where
            there is no processor.
    """

    input_ids: list[int]
    labels: list[int]
    spans: tuple[tuple[int, int], ...]
    route: Route
    flags: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a row cannot be trained on.

    Attributes:
        reason (`str`): Code, such as `text_lost`.
        detail (`str`): What was found, in words.
    """

    reason: str
    detail: str


def check_row(row: Tokenized, example: Example, template: ModelTemplate, reasoning: Reasoning) -> Refusal | None:
    """Checks tokens against the example that they stand for, by decoding them.

    Args:
        row (`Tokenized`): Ids and labels.
        example (`Example`): What they stand for.
        template (`ModelTemplate`): Of the model that will be trained.
        reasoning (`str`): With `keep`, the reasoning of every turn has to be there.

    Returns:
        `Refusal`, *optional*: What is wrong, `None` where nothing is.
    """
    turns = example.turns
    if len(row.labels) != len(row.input_ids) or len(row.spans) != len(turns):
        return Refusal("mask_differs", f"{len(row.spans)} trained spans for {len(turns)} assistant turns")
    expected = labels_of(row.input_ids, row.spans)
    if row.labels != expected:
        return Refusal("mask_differs", "the labels do not cover exactly the assistant turns")
    for (start, end), message in zip(row.spans, turns, strict=True):
        ids = row.input_ids[start:end]
        is_cut = example.truncated and message is turns[-1]
        problem = end_problem(ids, template.end_ids, is_cut=is_cut) or turn_problem(
            template.decode(ids), message, template.scaffolds, reasoning
        )
        if problem is not None:
            return problem
    return lost_text(template.decode(row.input_ids, skip_special=False), example)


def labels_of(ids: list[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """Labels: the id within the spans, -100 elsewhere."""
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def end_problem(ids: list[int], end_ids: frozenset[int], *, is_cut: bool = False) -> Refusal | None:
    """Looks at the end of a turn's tokens: one that ends a turn stands there (unless it was cut), and not before."""
    if is_cut and ids and end_ids.isdisjoint(ids):
        return None
    if not ids or ids[-1] not in end_ids:
        return Refusal("turn_end_missing", "an assistant turn does not end with a token that ends a turn")
    if ids[-1] in ids[:-1]:
        return Refusal("turn_end_inside", "the token that ends a turn stands inside an assistant turn")
    return None


def turn_problem(text: str, message: Message, scaffolds: frozenset[str], reasoning: Reasoning) -> Refusal | None:
    """Compares what is trained of a turn with the message that it stands for.

    Args:
        text (`str`): The turn's text, without special tokens.
        message (`Message`): The assistant message.
        scaffolds (`frozenset[str]`): What may stand beside the words, without white space.
        reasoning (`str`): With `keep`, the reasoning has to be there.

    Returns:
        `Refusal`, *optional*: `reasoning_lost` or `loss_text_differs`; `None` where the two agree.
    """
    rest = _normal(text)
    thought, content = _normal(message.reasoning_content or "").strip(), _normal(message.content).strip()
    if thought:
        before, found, after = rest.partition(thought)
        if not found and reasoning == "keep":
            return Refusal("reasoning_lost", "the chat template drops the reasoning of an assistant turn")
        rest = before + after
    for part in filter(None, [content] if content in rest else think_and_answer(content)):
        # From the right: reasoning that stays in the text may hold the answer, too.
        before, found, after = rest.rpartition(part)
        if not found:
            return Refusal("loss_text_differs", "the trained tokens do not hold the text of the assistant turn")
        rest = before + after
    for name, count in Counter(call.name for call in message.tool_calls).items():
        if rest.count(name) < count:
            return Refusal("loss_text_differs", f"the trained tokens do not hold {count} calls of '{name}'")
    for call in message.tool_calls:
        for spellings in argument_texts(call.arguments):
            if not any(_normal(spelling) in rest for spelling in spellings):
                return Refusal("loss_text_differs", f"the trained tokens miss an argument of '{call.name}'")
    if not message.tool_calls and squeeze(rest) not in scaffolds and squeeze(_THINK_TAGS.sub("", rest)):
        more = rest.strip()[:80]
        return Refusal("loss_text_differs", f"the trained tokens hold more than the assistant turn: {more!r}")
    return None


def think_and_answer(content: str) -> list[str]:
    """Text with think tags (the first of which a prompt may have held) as two: templates space them anew."""
    match = _THINKING.fullmatch(content)
    return [part.strip() for part in match.groups()] if match else [content]


def lost_text(rendering: str, example: Example) -> Refusal | None:
    """Looks for the text of every message, every call and every declared tool in a rendering."""
    whole = _normal(rendering)
    for number, message in enumerate((*example.prompt, *example.completion)):
        parts = [_normal(text).strip() for text in texts_of(message)]
        if not all(part in whole for part in parts):
            if message.role == "assistant":
                parts = think_and_answer(parts[-1])
            # Of earlier turns many templates show the answer only, as a server does.
            shown = parts[-1:] if message.role == "assistant" and number < len(example.prompt) else parts
            if not all(part in whole for part in shown):
                return Refusal("text_lost", f"the text of a {message.role} message is not in the rendering")
    declared = [tool.get("function", {}).get("name", "") for tool in example.tools]
    called = [call.name for message in example.messages for call in message.tool_calls]
    for name, count in Counter([*declared, *called]).items():
        if whole.count(name) < count:
            return Refusal("text_lost", f"of the declaration and the calls of '{name}' not all are in the rendering")
    return None


def _normal(text: str) -> str:
    # Several tokenizers compose characters (NFC); the words stay the same.
    return text if text.isascii() else unicodedata.normalize("NFC", text)
