"""What a run will do and need, before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gymtrl.doctor.finding import Finding
from gymtrl.reports.finding import finding_text
from gymtrl.reports.training import planned
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
            f"time: about {_time(speed['seconds'])} for the steps alone, at {speed['tokens_per_second']:,.0f} tokens/s "
            f"measured on the longest rows; a process held {_size(speed['peak_memory'])} at most",
            highlight=False,
        )
    _render_remarks(facts["notes"], [Finding(**finding) for finding in facts["findings"]], console)


def render_start(plan: Mapping[str, Any], notes: Sequence[str], findings: Sequence[Finding], console: Console) -> None:
    """Prints, in a few lines, what a run that begins now will do, and what is to be said of it beforehand.

    Args:
        plan (`Mapping[str, Any]`): The numbers of the plan by name.
        notes (`Sequence[str]`): What was traded for what, and what may not fit.
        findings (`Sequence[Finding]`): Of the doctor before training.
        console (`rich.console.Console`): Where to.
    """
    numbers = [*planned(plan), ("learning rate", f"{plan['learning_rate']:g}")]
    told = " · ".join(f"{name} {value}" for name, value in numbers)
    console.print(Text(f"plan: {plain(told)}"), soft_wrap=True)
    _render_remarks(notes, findings, console)


def _render_remarks(notes: Sequence[str], findings: Sequence[Finding], console: Console) -> None:
    for note in notes:
        console.print(Text(f"note: {plain(note)}"), soft_wrap=True)
    for finding in findings:
        console.print(finding_text(finding), soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
