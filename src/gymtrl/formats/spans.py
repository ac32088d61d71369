"""Rendered texts → token ids, with the characters of the trained turns as ranges of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from gymtrl.formats.templates import ModelTemplate

Span = tuple[int, int]
"""Half-open range of characters or tokens."""

_WINDOW = 40  # characters on each side of a cut; tokens across it are seldom longer than a word


def encode_all(
    texts: Sequence[tuple[str, tuple[Span, ...]]], template: ModelTemplate
) -> list[tuple[list[int], tuple[Span, ...]] | None]:
    """Encodes texts so that every trained turn begins with a token of its own, as when the model generates it.

    Args:
        texts (`Sequence[tuple[str, tuple[Span, ...]]]`): Rendered texts with the characters of their trained turns.
        template (`ModelTemplate`): Of the model.

    Returns:
        `list`: Ids and the turns' token ranges; `None` where a server, which encodes earlier turns together with what
        stands around them, would get other ids for them.
    """
    return _in_pieces(texts, template) if template.piecewise else [_at_once(*text, template) for text in texts]


def _in_pieces(
    texts: Sequence[tuple[str, tuple[Span, ...]]], template: ModelTemplate
) -> list[tuple[list[int], tuple[Span, ...]] | None]:
    """Turns are encoded apart from their prompts: an answer's first line break must not melt into the header's last."""
    melting = _melting(texts, template)
    pieces: list[str] = []
    for text, spans in texts:
        cuts = [0, *(position for span in spans for position in span), len(text)]
        pieces += [text[start:end] for start, end in pairwise(cuts)]
    encoded = iter(template.encode_all(pieces)) if pieces else iter(())
    found: list[tuple[list[int], tuple[Span, ...]] | None] = []
    for number, (_, spans) in enumerate(texts):
        ids = list(next(encoded))
        ranges = []
        for _ in spans:
            start = len(ids)
            ids += next(encoded)
            ranges.append((start, len(ids)))
            ids += next(encoded)
        found.append(None if number in melting else (ids, tuple(ranges)))
    return found


def _melting(texts: Sequence[tuple[str, tuple[Span, ...]]], template: ModelTemplate) -> set[int]:
    """Texts in which an earlier turn and its header share a token where they are encoded together."""
    windows: dict[tuple[str, str], list[int]] = {}
    for number, (text, spans) in enumerate(texts):
        for start, _ in spans[:-1]:
            window = text[max(0, start - _WINDOW) : start], text[start : start + _WINDOW]
            windows.setdefault(window, []).append(number)
    if not windows:
        return set()
    encoded = iter(template.encode_all([part for head, tail in windows for part in (head + tail, head, tail)]))
    found: set[int] = set()
    for numbers in windows.values():
        if next(encoded) != next(encoded) + next(encoded):
            found.update(numbers)
    return found


def _at_once(text: str, spans: Iterable[Span], template: ModelTemplate) -> tuple[list[int], tuple[Span, ...]] | None:
    """For tokenizers that begin every text in a way of their own; a turn has to begin with a token there as well."""
    if not template.tokenizer.is_fast:  # it does not tell where its tokens stand in the text
        return None
    encoded = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for index, (start, end) in enumerate(encoded["offset_mapping"]):
        if end > start:
            starts.setdefault(start, index)
            ends[end] = index + 1
    ranges = []
    for start, end in spans:
        if start not in starts or end not in ends:
            return None
        # The server encodes what stands before the turn alone, and may get other tokens at its end.
        before = text[max(0, start - _WINDOW) : start]
        alone, both = template.encode_all([before, before + text[start : start + _WINDOW]])
        if both[: len(alone)] != alone:
            return None
        ranges.append((starts[start], ends[end]))
    return list(encoded["input_ids"]), tuple(ranges)
