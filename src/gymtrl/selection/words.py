"""Text as words and word n-grams, for comparing one text with another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Han, kana, Thai, Lao, Burmese, Khmer: scripts that set no space between words.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


def split_words(text: str) -> list[str]:
    """The words between white space; each character of a script that sets no spaces is a word of its own."""
    return (text if text.isascii() else _UNSPACED.sub(r" \1 ", text)).split()


def ngrams(words: Sequence[str], n: int) -> Iterator[str]:
    """The word n-grams of a text; a text of fewer words is its only one, an empty text has none."""
    if 0 < len(words) < n:
        yield " ".join(words)
    yield from map(" ".join, zip(*(words[start:] for start in range(n)), strict=False))
