"""A comparison, for a terminal."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gymtrl.comparison.compare import Comparison
from gymtrl.text import plain

_SHOWN_TASKS = 3
_COLOURS = {"improved": "green", "regressed": "red", "not shown": "yellow"}


def comparison_json(comparison: Comparison) -> str:
    """Returns the comparison as one JSON document."""
    return msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode() + "\n"


def render_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the means with their intervals, flips, the tasks that changed most, warnings, and the verdict."""
    console = console or Console()
    table = Table("", "mean reward", "95 % interval", box=None, padding=(0, 2))
    for name in ("before", "after", "difference"):
        e = getattr(comparison, name)
        sign = "+" if name == "difference" else ""
        table.add_row(name, f"{e.mean:{sign}.3f}", f"{e.low:{sign}.3f} to {e.high:{sign}.3f}")
    console.print(table)
    d = comparison.difference
    console.print(
        f"{d.n} tasks in {d.clusters} clusters: {comparison.better} better, {comparison.worse} worse, "
        f"{comparison.equal} equal; {comparison.solved} newly solved, {comparison.lost} lost "
        f"(most rollouts at {comparison.pass_threshold:g} or more)"
    )
    console.print(f"sign-flip test over clusters: p = {comparison.sign_flip_p:.2g}")
    console.print(f"smallest change that this sample would show four times in five: {d.detectable:.3f}")
    if comparison.worse:
        console.print("worst changes:")
        for task in comparison.tasks[:_SHOWN_TASKS]:
            if task.after < task.before:
                question = plain(" ".join(task.question.split()))[:80]
                console.print(f"  {task.before:.2f} → {task.after:.2f}  {escape(question)}")
    for warning in comparison.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    console.print(f"[bold {_COLOURS[comparison.outcome]}]{escape(comparison.verdict)}[/]", soft_wrap=True)
