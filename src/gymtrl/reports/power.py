"""How many tasks and repeats a comparison needs, for a terminal."""

from __future__ import annotations

import math

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gymtrl.comparison.power_plan import Needed, PowerPlan
from gymtrl.text import plain


def power_json(plan: PowerPlan) -> str:
    """Returns the plan as one JSON document."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"


def render_power(plan: PowerPlan, console: Console | None = None) -> None:
    """Prints the tasks that show the effect, what other numbers of them show, and the answer in one sentence."""
    console = console or Console()
    heads = [f"× {repeats}" for repeats in plan.repeats]
    console.print(Text(f"tasks that show {plan.effect:g}, by rollouts of each task on each side:"))
    needed = Table("", *heads, box=None, padding=(0, 2))
    for one in plan.needed:
        needed.add_row(_source(one), *(f"{tasks:,}" for tasks in one.tasks))
    console.print(needed)
    console.print("\nsmallest difference that is shown four times in five:", highlight=False)
    shown = Table("tasks", *heads, box=None, padding=(0, 2))
    for tasks, effects in zip(plan.tasks, plan.detectable, strict=True):
        shown.add_row(f"{tasks:,}", *(f"{effect:.3f}" if math.isfinite(effect) else "none" for effect in effects))
    console.print(shown)
    variance = plan.taken.variance
    console.print(
        f"\nvariance from {plan.measured_tasks:,} tasks: {variance.between:.4f} between tasks' true differences "
        f"(ω²), {variance.within:.4f} from rollout to rollout, both sides together (σ²)",
        highlight=False,
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(Text("note: ", style="yellow") + Text(plain(note)), soft_wrap=True)
    console.print(Text(power_sentence(plan), style="bold"), soft_wrap=True)


def power_sentence(plan: PowerPlan) -> str:
    """Returns the answer in one sentence."""
    if plan.unlimited is not None:
        return _of_tasks(plan, plan.tasks[0], plan.unlimited)
    answers = [
        f"{tasks:,} tasks × {repeats} ({2 * tasks * repeats:,} rollouts)"
        for tasks, repeats in zip(plan.taken.tasks, plan.repeats, strict=True)
    ]
    return f"To show {plan.effect:g} four times in five, before and after together: {' or '.join(answers)}."


def _of_tasks(plan: PowerPlan, tasks: int, unlimited: float) -> str:
    if len(plan.repeats) == 1 and math.isfinite(unlimited):
        sentence = f"{tasks:,} tasks × {plan.repeats[0]} show {plan.detectable[0][0]:.3f} four times in five"
        return f"{sentence}; {plan.effect:g} needs {plan.taken.tasks[0]:,} tasks."
    if math.isinf(unlimited):
        return f"{tasks:,} tasks are too few: in clusters like these they are no sample."
    if plan.repeats_needed is None:
        return (
            f"{tasks:,} tasks do not show {plan.effect:g} with any number of repeats; they could show {unlimited:.3f}."
        )
    return f"{tasks:,} tasks show {plan.effect:g} four times in five with {plan.repeats_needed:,} repeats on each side."


def _source(one: Needed) -> str:
    return "measured" if one.correlation is None else f"correlation {one.correlation:g}"
