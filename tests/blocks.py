"""Blocks of a page that run: `sh` and `python`, each with the output that the page shows right behind it.

Output behind `<!-- varies -->` differs from machine to machine: its numbers may be others, and of its lines `…` stands
for any. All other output is compared as it is. Blocks of another language, such as `bash`, do not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```$"
    r"(?:\n\n(?P<varies><!-- varies -->\n)?```text\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_NAME = re.compile(r"[^\W\d][\w-]*")


@dataclass(frozen=True)
class Block:
    """A block that runs.

    Attributes:
        language (`str`): `"sh"` or `"python"`.
        code (`str`): What runs.
        shown (`str`): What the page shows as its output; `""` for nothing.
        varies (`bool`): The output differs from machine to machine.
    """

    language: str
    code: str
    shown: str
    varies: bool

    def run(self, folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs it in `folder`, with `variables` beside those of this process."""
        command = ["bash", "-euc"] if self.language == "sh" else [sys.executable, "-c"]
        env = environment() | variables
        return subprocess.run([*command, self.code], cwd=folder, env=env, capture_output=True, text=True)

    def agrees(self, printed: str) -> bool:
        """Whether what it printed is what the page shows."""
        lines, shown = (text.splitlines() for text in (printed, self.shown))
        if not self.varies:
            return [line.rstrip() for line in lines] == shown
        found = "".join(f"{_without_numbers(line)}\n" for line in lines)
        return re.fullmatch("".join(_pattern(line) for line in shown), found) is not None


def environment() -> dict[str, str]:
    """The variables with which blocks run: this interpreter's commands come first, and lines are as wide as a page."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "112"}


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that run, in order."""
    return [_block(found) for found in _BLOCK.finditer(page.read_text())]


def filled(text: str, printed: Mapping[str, str]) -> str:
    """A page with what its blocks printed, where it shows something else, or only `…`.

    Args:
        text (`str`): The page.
        printed (`Mapping[str, str]`): Code of a block → what it printed; others stay as they are.
    """
    parts, place = [], 0
    for found in _BLOCK.finditer(text):
        block = _block(found)
        if found["shown"] is None or block.code not in printed:
            continue
        if block.shown == "…\n" or not block.agrees(printed[block.code]):
            start, end = found.span("shown")
            parts += [text[place:start], *(f"{line.rstrip()}\n" for line in printed[block.code].splitlines())]
            place = end
    return "".join([*parts, text[place:]])


def _block(found: re.Match[str]) -> Block:
    return Block(found["language"], found["code"], found["shown"] or "", bool(found["varies"]))


def _pattern(line: str) -> str:
    return r"(?:.*\n)*?" if line == "…" else re.escape(_without_numbers(line)) + r"\n"


def _without_numbers(line: str) -> str:
    """A line with a mark in place of each number that is no part of a name, and single spaces, as columns shift."""
    parts = []
    place = 0
    while place < len(line):
        found = _NAME.match(line, place) or _NUMBER.match(line, place)
        part = found[0] if found else line[place]
        parts.append("#" if found and found.re is _NUMBER else part)
        place += len(part)
    return " ".join("".join(parts).split())
