"""Rollouts → the rows that a model is fine-tuned on: one for each query, or where need be one for each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gymtrl.formats.checks import Refusal, Tokenized
from gymtrl.formats.example import Example, by_call, by_query, whole, without_reasoning
from gymtrl.formats.masks import NOT_PRESERVING, tokenize_all
from gymtrl.formats.recorded import by_history
from gymtrl.formats.settings import Reasoning
from gymtrl.formats.templates import ModelTemplate
from gymtrl.rollouts.record import Rollout

_REWRITTEN = (NOT_PRESERVING, "reasoning_lost")
"""What templates that change earlier turns bring about: alone, each turn may still be shown as it was."""


@dataclass(frozen=True)
class Row:
    """A row to fine-tune on.

    Attributes:
        example (`Example`): Its messages.
        tokens (`Tokenized`): Its ids and labels.
    """

    example: Example
    tokens: Tokenized


def rows_of(
    rollouts: Sequence[Rollout], template: ModelTemplate, *, reasoning: Reasoning = "keep", use_recorded: bool = True
) -> list[list[Row] | Refusal]:
    """Makes the rows of rollouts.

    A rollout whose recorded ids fit gives one row for each stretch in which every call continues the one before. Else
    it gives one row for each user message that the policy answered, and where the template rewrites earlier turns of
    the same query, one for each call of the model.

    Args:
        rollouts (`Sequence[Rollout]`): Tokenized together.
        template, reasoning, use_recorded: As in `tokenize_all`.

    Returns:
        `list[list[Row] | Refusal]`: For each rollout its rows, which together hold every turn once; or why there are
        none: if one part of it cannot be trained on, none is.
    """
    examples = [whole(rollout) for rollout in rollouts]
    recorded = _recorded_rows(examples, template, reasoning) if use_recorded else [None] * len(examples)
    left = [i for i, found in enumerate(recorded) if not isinstance(found, list)]
    rendered = dict(zip(left, _rendered_rows([examples[i] for i in left], template, reasoning), strict=True))
    made: list[list[Row] | Refusal] = []
    for number, found in enumerate(recorded):
        if isinstance(found, list):
            made.append(found)
        else:
            made.append(_flagged(rendered[number], found))
    return made


def _recorded_rows(
    examples: Sequence[Example], template: ModelTemplate, reasoning: Reasoning
) -> list[list[Row] | Refusal | None]:
    """Rows of recorded ids, or why these cannot be used; `None` where there are none."""
    made: list[list[Row] | Refusal | None] = []
    for example in examples:
        if not example.recorded or (reasoning == "drop" and not without_reasoning(example).recorded):
            made.append(None)
            continue
        parts = by_history(example)
        tokens = tokenize_all(parts, template, reasoning=reasoning, recorded="only")
        refused = next((found for found in tokens if isinstance(found, Refusal)), None)
        made.append(refused or [Row(p, t) for p, t in zip(parts, tokens, strict=True) if isinstance(t, Tokenized)])
    return made


def _rendered_rows(
    examples: Sequence[Example], template: ModelTemplate, reasoning: Reasoning
) -> list[list[Row] | Refusal]:
    parts = [by_query(example) for example in examples]
    tokens = _grouped(parts, template, reasoning)
    rewritten = {
        i: [call for example in parts[i] for call in by_call(example)]
        for i, found in enumerate(tokens)
        if any(isinstance(entry, Refusal) and entry.reason in _REWRITTEN for entry in found)
    }
    for i, found in zip(rewritten, _grouped(list(rewritten.values()), template, reasoning), strict=True):
        parts[i], tokens[i] = rewritten[i], found
    made: list[list[Row] | Refusal] = []
    for examples_of, found in zip(parts, tokens, strict=True):
        refused = next((entry for entry in found if isinstance(entry, Refusal)), None)
        made.append(refused or [Row(e, t) for e, t in zip(examples_of, found, strict=True) if isinstance(t, Tokenized)])
    return made


def _grouped(
    parts: Sequence[Sequence[Example]], template: ModelTemplate, reasoning: Reasoning
) -> list[list[Tokenized | Refusal]]:
    flat = [example for examples in parts for example in examples]
    tokens = iter(tokenize_all(flat, template, reasoning=reasoning, recorded="never"))
    return [[next(tokens) for _ in examples] for examples in parts]


def _flagged(rows: list[Row] | Refusal, unused: Refusal | None) -> list[Row] | Refusal:
    """Notes on the rows why recorded ids were not used."""
    if isinstance(rows, Refusal) or unused is None:
        return rows
    flag = f"recorded_ids_unused:{unused.reason}"
    return [replace(row, tokens=replace(row.tokens, flags=(flag, *row.tokens.flags))) for row in rows]
