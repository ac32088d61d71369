"""Rows of a dataset on a terminal, with the tokens that carry loss painted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from gymtrl.formats.painted import Objective, PaintedRow, Side
from gymtrl.formats.painted_checks import Check
from gymtrl.text import plain

TRAINED, CONTEXT = "bold black on green", "dim"


def print_rows(rows: Iterable[PaintedRow], console: Console) -> None:
    """Prints rows one below the other; without colours, what carries loss stands in ⟦ ⟧.

    Args:
        rows (`Iterable[PaintedRow]`): As `painted_rows` gives them.
        console (`Console`): Where to print. Nothing of the rows is taken for markup.

    Raises:
        `UserError`: What reading the next row raises.
    """
    colourless = console.color_system is None or console.no_color
    for row in rows:
        console.print(Rule(Text(plain(row.title)), style="bold"))
        facts = [*row.facts, *(("flag", flag) for flag in row.flags)]
        console.print(Text(plain(" · ".join(f"{name} {value}" for name, value in facts))))
        for side in row.sides:
            for text in _side(side, row.objective, brackets=colourless):
                console.print(text)
        console.print()


def counted(side: Side, objective: Objective) -> str:
    """How many tokens there are and what they do, in words."""
    if objective == "prompts":
        return f"{side.tokens:,} tokens of prompt; the model answers in training"
    if objective == "reward":
        return f"{side.tokens:,} tokens, scored at the last one"
    return f"{side.tokens:,} tokens, {side.trained:,} with loss ({side.share:.0%})"


def _side(side: Side, objective: Objective, *, brackets: bool) -> Iterator[Text]:
    words = " · ".join([*([side.name] if side.name else []), *(f"{name} {value}" for name, value in side.facts)])
    yield Text(plain(f"── {words}{' · ' if words else ''}{counted(side, objective)}"), "bold")
    text = Text()
    for segment in side.segments:
        part = plain(segment.text)
        if brackets:
            # Foreign text must not draw the brackets itself.
            part = part.replace("⟦", "[[").replace("⟧", "]]")
        text.append(f"⟦{part}⟧" if segment.trained and brackets else part, TRAINED if segment.trained else CONTEXT)
    yield text
    yield from map(_check, side.checks)


def _check(check: Check) -> Text:
    return Text(f"{'✓' if check.passed else '✗'} {plain(check.words)}", "green" if check.passed else "bold red")
