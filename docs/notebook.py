"""The tutorial as a notebook: what runs on the page are its cells, all else is its text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_BLOCK = re.compile(
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```\n(?:\n(?:<!-- varies -->\n)?```text\n(?P<shown>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r"^:{3,}\{(?:tab-item|admonition|dropdown)\} (.*)$", re.MULTILINE)
_MARKUP = re.compile(r"^(?::{3,}.*|:(?:class|sync|sync-group|gutter): .*|<!-- .* -->|\([a-z-]+\)=)\n", re.MULTILINE)


def notebook(page: str) -> str:
    """A page in MyST as a notebook (nbformat 4.5); the outputs are those that the page shows.

    Args:
        page (`str`): Text of the page.
    """
    cells = [cell | {"id": f"cell-{place}"} for place, cell in enumerate(_cells(page))]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _cells(page: str) -> Iterator[dict[str, Any]]:
    place = 0
    for found in _BLOCK.finditer(page):
        yield from _text(page[place : found.start()])
        code, shown = found["code"].rstrip("\n"), found["shown"]
        source = f"%%bash -eu\n{code}" if found["language"] == "sh" else code
        output = {"name": "stdout", "output_type": "stream", "text": _lines(shown or "")}
        yield {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [output] if shown else [],
            "source": _lines(source),
        }
        place = found.end()
    yield from _text(page[place:])


def _text(part: str) -> Iterator[dict[str, Any]]:
    """Text without what only the site understands."""
    words = _MARKUP.sub("", _TITLE.sub(r"**\1**\n", part))
    words = re.sub(r"\n{3,}", "\n\n", words).strip("\n")
    if words:
        yield {"cell_type": "markdown", "metadata": {}, "source": _lines(words)}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
