"""What a run will do and need, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gymtrl.text import plain

_GIB = 2**30


def render_plan(facts: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a plan.

    Args:
        facts (`Mapping[str, Any]`): As `plan_facts` of the training room returns it.
        console (`Console`, *optional*): Where to; standard output unless given.
    """
    console = console or Console()
    numbers = Table("number", "value", "origin", box=None, padding=(0, 2))
    for name, entry in facts["plan"].items():
        numbers.add_row(name, _shown(entry["value"]), Text(plain(entry["origin"])))
    console.print(numbers)
    memory = facts["memory"]
    parts = "  ".join(f"{name} {_size(size)}" for name, size in memory["parts"].items() if size)
    console.print(
        f"\nmemory a process: about {_size(memory['total'])} beyond Python and its libraries, "
        f"{_size(memory['available'])} can be used",
        highlight=False,
    )
    console.print(f"  {parts}", highlight=False, soft_wrap=True)
    data = facts["data"]
    console.print(
        f"data: {data['rows']:,} rows, {data['tokens']:,} tokens, {data['loss_tokens']:,} of them carry loss; the "
        f"longest sequence has {data['longest']:,}",
        highlight=False,
    )
    if "speed" in facts:
        speed = facts["speed"]
        console.print(
            f"time: about {_time(speed['seconds'])} at {speed['tokens_per_second']:,.0f} tokens/s on the longest rows, "
            f"measured; {_size(speed['peak_memory'])} held at most",
            highlight=False,
        )
    for note in facts["notes"]:
        console.print(Text(f"note: {plain(note)}"), soft_wrap=True)
    for finding in facts["findings"]:
        console.print(Text(plain(f"{finding['severity']}: {finding['title']}: {finding['evidence']}")), soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
