"""Keys and values of token sequences seen lately, found again by their longest common prefix."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence

import torch

Tokens = tuple[int, ...]
Saved = tuple[torch.Tensor, torch.Tensor]

MIN_SHARED_TOKENS = 16
"""Prompts that share fewer leading tokens (a role header, say) are not worth a forward pass of their own."""


class PrefixStore:
    """A bounded memory of sequences; the least recently used one goes first.

    No stored sequence is a prefix of another: the longer one says all that the shorter one does.

    Args:
        max_tokens (`int`): Tokens held at most, all sequences together. 0 keeps nothing.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._saved: OrderedDict[Tokens, Saved] = OrderedDict()
        # Sorted, so that the longest common prefix with any sequence is found next to where it would stand.
        self._sorted: list[Tokens] = []

    def match(self, tokens: Tokens, limit: int) -> tuple[Saved | None, int]:
        """Finds the stored sequence that shares the most leading tokens.

        Args:
            tokens (`tuple[int, ...]`): The sequence looked for.
            limit (`int`): Tokens wanted at most.

        Returns:
            `tuple[Saved | None, int]`: Its keys and values, and how many leading tokens of them apply.
        """
        place = bisect_left(self._sorted, tokens)
        best, length = None, 0
        for neighbour in self._sorted[max(place - 1, 0) : place + 1]:
            common = common_prefix(neighbour, tokens)
            if common > length:
                best, length = neighbour, common
        length = min(length, limit)
        if best is None or length <= 0:
            return None, 0
        self._saved.move_to_end(best)
        return self._saved[best], length

    def covers(self, tokens: Tokens) -> bool:
        """Whether the whole sequence is held, alone or as the beginning of a longer one; counts as a use."""
        return self.match(tokens, len(tokens))[1] == len(tokens)

    def put(self, tokens: Tokens, saved: Saved) -> None:
        """Keeps a sequence, and drops what it makes superfluous or what no longer fits."""
        if not 0 < len(tokens) <= self.max_tokens or self.covers(tokens):
            return
        place = bisect_left(self._sorted, tokens)
        # A stored prefix of this sequence can only be its left neighbour, as none is a prefix of another.
        if place and tokens[: len(self._sorted[place - 1])] == self._sorted[place - 1]:
            self._drop(self._sorted[place - 1])
        while self.tokens + len(tokens) > self.max_tokens:
            self._drop(next(iter(self._saved)))
        insort(self._sorted, tokens)
        self._saved[tokens] = saved
        self.tokens += len(tokens)

    def _drop(self, tokens: Tokens) -> None:
        del self._saved[tokens]
        del self._sorted[bisect_left(self._sorted, tokens)]
        self.tokens -= len(tokens)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading tokens in which two sequences agree."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def shared_prefixes(prompts: Sequence[Tokens]) -> list[Tokens]:
    """The prefixes that are worth computing once for a group of different prompts.

    Prompts in sorted order fall into runs whose neighbours agree in at least `MIN_SHARED_TOKENS` tokens; each run of
    two or more yields what all of its prompts share.
    """
    found: list[Tokens] = []
    ordered = sorted(prompts)
    start = 0
    while start < len(ordered):
        end, length = start + 1, len(ordered[start]) - 1
        while end < len(ordered):
            common = common_prefix(ordered[end - 1], ordered[end])
            if common < MIN_SHARED_TOKENS:
                break
            length = min(length, common)
            end += 1
        if end - start > 1 and length >= MIN_SHARED_TOKENS:
            found.append(ordered[start][:length])
        start = end
    return found
