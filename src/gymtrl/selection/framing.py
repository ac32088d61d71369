"""Questions that stand in other words: those that a harness puts before or behind every question of an environment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .contamination import NGRAM, hash_words

# A cut is looked for in so many words of an edge, since an edge may take in words that all questions begin with.
_REACH = 64


@dataclass
class Edges:
    """What all texts of an environment begin and end with.

    Attributes:
        start, end (`list[str]`, *optional*): The words; `None` before the first text. The end is told backwards.
        several (`bool`): There are two different texts; of a single one nothing tells the edges.
    """

    start: list[str] | None = None
    end: list[str] | None = None
    several: bool = False

    def add(self, words: Sequence[str]) -> None:
        """Takes in a text."""
        backwards = list(reversed(words))
        if self.start is None or self.end is None:
            self.start, self.end = list(words), backwards
            return
        self.several = self.several or len(words) != len(self.start) or list(words) != self.start
        self.start = self.start[: _alike(self.start, words)]
        self.end = self.end[: _alike(self.end, backwards)]

    def cuts(self, words: Sequence[str]) -> tuple[int, int]:
        """How many words may be cut off at the start and at the end; none where nothing would be left."""
        if not self.several or self.start is None or self.end is None:
            return 0, 0
        before, behind = _alike(self.start, words), _alike(self.end, list(reversed(words)))
        return (before, behind) if before + behind < len(words) else (0, 0)


@dataclass
class Framed:
    """Texts with what may be cut off them, to find the same question in.

    Attributes:
        found (`dict[int, list[tuple[int, bool]]]`): By hash of what is left, whose text it is, and whether it is whole.
        lengths (`dict[str, set[int]]`): By first word, how many words such texts have.
    """

    found: defaultdict[int, list[tuple[int, bool]]] = field(default_factory=lambda: defaultdict(list))
    lengths: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def add(self, number: int, words: Sequence[str], edges: Edges) -> None:
        """Takes in a text.

        Args:
            number (`int`): Whose it is.
            words (`Sequence[str]`): The text.
            edges (`Edges`): Of its environment.
        """
        if not words:
            return
        before, behind = edges.cuts(words)
        cuts = {(a, b) for a in _reach(before) for b in (0, behind)}
        cuts |= {(a, b) for a in (0, before) for b in _reach(behind)}
        for a, b in cuts:
            left = words[a : len(words) - b]
            self.found[hash_words(left)].append((number, not a and not b))
            self.lengths[left[0]].add(len(left))

    def same(self, words: Sequence[str], edges: Edges) -> Iterator[int]:
        """Whose question a text asks.

        It does where one of the two texts is all of what is left of the other, or where 13 words or more are left of
        both: fewer can be the same in tasks that differ in the words around them.

        Args:
            words (`Sequence[str]`): The text.
            edges (`Edges`): Of its environment.
        """
        before, behind = edges.cuts(words)
        for a in _reach(before):
            lengths = self.lengths.get(words[a], ()) if a < len(words) else ()
            for b in _reach(behind):
                length = len(words) - a - b
                if length in lengths:
                    for number, whole in self.found.get(hash_words(words[a : a + length]), ()):
                        if whole or not (a or b) or length >= NGRAM:
                            yield number


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words two texts begin with alike."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))


def _reach(cut: int) -> list[int]:
    return sorted({0, *range(max(0, cut - _REACH), cut + 1)})
