"""A filter before it runs, for a terminal."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gymtrl.selection.funnel import Preview
from gymtrl.text import plain

from .stage import split_line


def preview_json(settings: dict[str, Any], preview: Preview) -> str:
    """The resolved settings and the preview as one JSON document, indented, with a final line break."""
    content = {"settings": settings} | msgspec.to_builtins(preview)
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"


def render_preview(preview: Preview, console: Console | None = None) -> None:
    """Prints the rows that each rule leaves, what other thresholds would keep, and the split or an error."""
    console = console or Console()
    console.print(_funnel(preview))
    console.print()
    console.print(_sweep(preview))
    if preview.threshold is not None:
        console.print(Text(f"* {plain(preview.threshold_why)}"))
    elif preview.thresholds:
        console.print(Text(plain(preview.threshold_why)))
    if any(kept.estimated for kept in preview.sweep):
        console.print(Text("~ with estimates, a token for four characters, where the run did not count tokens"))
    if preview.stops:
        console.print(Text(plain(f"the filter would stop: {preview.stops}"), style="yellow"), soft_wrap=True)
        if preview.remedy:
            console.print(Text(plain(f"remedy: {preview.remedy}"), style="yellow"), soft_wrap=True)
    else:
        sides = preview.split.items()
        console.print(split_line({name: side.rows for name, side in sides}, {name: s.tasks for name, s in sides}))
    console.print("dry run: nothing was written")


def _funnel(preview: Preview) -> Table:
    table = Table("rule", box=None, padding=(0, 2))
    table.add_column("dropped", justify="right")
    table.add_column("left", justify="right")
    table.add_column("because", style="dim")
    table.add_row("", "", f"{preview.rows:,}", "lines")
    for step in preview.funnel:
        style = "" if step.dropped else "dim"
        table.add_row(Text(step.rule), f"{step.dropped:,}", f"{step.left:,}", Text(step.words), style=style)
    return table


def _sweep(preview: Preview) -> Table:
    table = Table(box=None, padding=(0, 2))
    for name in ("threshold", "rows", "tasks", "tokens"):
        table.add_column(name, justify="right")
    for kept in preview.sweep:
        threshold = f"{'* ' if kept.chosen else ''}{kept.threshold:g}"
        tokens = f"{'~' if kept.estimated else ''}{kept.tokens:,}"
        style = "bold" if kept.chosen else ""
        table.add_row(threshold, f"{kept.rows:,}", f"{kept.tasks:,}", tokens, style=style)
    return table
