"""How much of a text repeats itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

# Characters that stand for a word where there are no spaces: about an English word with its space.
_WORD = 5
# Odd: 2**64 over the golden ratio.
_MULTIPLIER = 0x9E3779B97F4A7C15


def repetition(text: str, n: int = 10) -> float:
    """The share of a text that stands in word n-grams which occurred before.

    It is the duplicate n-gram character fraction of arXiv 2112.11446 (table A1): characters in duplicate n-grams, those
    in several counted once, over all characters. Unlike there the first occurrence of an n-gram does not count, so that
    an answer which states the reasoning's result once more has a share of one half at most and a loop goes towards 1.
    White space is not counted. The paper lets pass up to 0.10 of a web page for n = 10; reasoning, code and grids in
    rollouts have more without being degenerate.

    Words are what stands between white space, as written. A stretch without white space that is longer than `5 * n`
    characters (a loop of one token, a script that sets no spaces) is measured by its character n-grams of that length.

    Args:
        text (`str`): The text.
        n (`int`, *optional*, defaults to 10): Words of an n-gram.

    Returns:
        `float`: From 0 to below 1; 0 for a text of `n` words or fewer without such a stretch.
    """
    words = text.split()
    if not words:
        return 0.0
    numbers: dict[str, int] = {}
    numbered = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    repeated = _in_repeats(numbered, n)
    covered = lengths[repeated].sum()
    stretches = np.flatnonzero(~repeated & (lengths > n * _WORD))
    if stretches.size:
        joined = " ".join(words[stretch] for stretch in stretches)
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        inside = _in_repeats(characters.astype(np.uint64), n * _WORD)
        covered += (inside & (characters != ord(" "))).sum()
    return float(covered / lengths.sum())


def _in_repeats(units: npt.NDArray[np.uint64], n: int) -> npt.NDArray[Any]:
    """For each unit whether it stands in a window of `n` that occurred before."""
    windows = len(units) - n + 1
    if windows < 2:
        return np.zeros(len(units), dtype=np.bool_)
    repeat = ~pl.Series(_window_hashes(units, n)).is_first_distinct().to_numpy()
    edges = np.zeros(len(units) + 1, dtype=np.int64)
    edges[:windows] += repeat
    edges[n:] -= repeat
    return np.cumsum(edges[:-1]) > 0


def _window_hashes(units: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """A number for each window of `n` units: a polynomial modulo 2**64, of windows that double their width."""
    hashes, width = units, 1
    while width < n:
        step = min(width, n - width)
        hashes = hashes[:-step] * np.uint64(pow(_MULTIPLIER, step, 2**64)) + hashes[step:]
        width += step
    return hashes
