"""Completions of one task that say nearly the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from gymtrl.rollouts.record import Message

from .words import ngrams, split_words

# Word 5-grams and a Jaccard index of 0.8 are those of NearDup, arXiv 2107.06499, appendix A. It goes on to the edit
# similarity of a pair; the exact Jaccard index that decides here is ours, as are the figures below.
SHINGLE = 5
JACCARD = 0.8
PERMUTATIONS = 128
SEED = 1
# Share of the near-duplicates at the threshold that banding may miss.
_MISSED = 0.001
# Up to here comparing every pair is faster than sketching every text, let alone than importing what sketches it.
_FEW = 64


def near_duplicates(texts: Sequence[str], threshold: float = JACCARD) -> list[int | None]:
    """Finds texts that nearly repeat an earlier one.

    Two texts nearly repeat each other where the Jaccard index of their sets of word 5-grams reaches the threshold. Of
    many texts only those pairs are compared that MinHash and locality-sensitive hashing propose, which at the
    threshold leaves out fewer than one pair in a thousand and above it far fewer.

    Args:
        texts (`Sequence[str]`): The preferred one first.
        threshold (`float`, *optional*, defaults to 0.8): Lowest Jaccard index of near-duplicates, above 0.

    Returns:
        `list[int | None]`: For each text the first of the earlier ones that it nearly repeats and that repeats none
            itself; `None` where there is none.
    """
    shingles = [set(ngrams(split_words(text), SHINGLE)) for text in texts]
    index = _Index(threshold) if len(texts) > _FEW else None
    kept: list[int] = []
    found: list[int | None] = []
    for number, own in enumerate(shingles):
        earlier = index.propose(own) if index else kept
        repeated = next((other for other in earlier if _reaches(own, shingles[other], threshold)), None)
        if repeated is None:
            kept.append(number)
            if index:
                index.add(number)
        found.append(repeated)
    return found


def completion_text(messages: Sequence[Message]) -> str:
    """What the policy produced in a completion: reasoning, text and calls, without tool results and user turns."""
    said: list[str] = []
    for message in messages:
        if message.role != "assistant":
            continue
        said.extend(text for text in (message.reasoning_content, message.content) if text)
        for call in message.tool_calls:
            said.extend((call.name, *_texts(call.arguments)))
    return "\n".join(said)


class _Index:
    """MinHash sketches of the texts that were kept, in bands."""

    def __init__(self, threshold: float) -> None:
        # It imports scipy.integrate, half a second that a group of the usual size does not need.
        from datasketch import MinHash, MinHashLSH

        rows = _rows_per_band(threshold)
        self._bands = MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
        self._blank = MinHash(num_perm=PERMUTATIONS, seed=SEED)
        self._sketch = self._blank

    def propose(self, shingles: set[str]) -> list[int]:
        """Earlier texts that may resemble this one, in order."""
        self._sketch = self._blank.copy()
        self._sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        return sorted(self._bands.query(self._sketch))

    def add(self, number: int) -> None:
        """Keeps the text that was asked about last."""
        self._bands.insert(number, self._sketch)


def _rows_per_band(threshold: float) -> int:
    """The most rows (two bands at least), so the fewest pairs, with which enough near-duplicates share a band."""
    rows = range(PERMUTATIONS // 2, 1, -1)
    return next((r for r in rows if (1 - threshold**r) ** (PERMUTATIONS // r) <= _MISSED), 1)


def _reaches(one: set[str], other: set[str], threshold: float) -> bool:
    smaller, larger = sorted((len(one), len(other)))
    if not larger:  # two empty texts
        return True
    if smaller / larger < threshold:  # the index cannot be higher
        return False
    shared = len(one & other)
    return shared / (smaller + larger - shared) >= threshold


def _texts(value: Any) -> Iterator[str]:
    """The keys and values of a call's arguments, strings as they are."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    else:
        yield value if isinstance(value, str) else json.dumps(value)
