"""A comparison, for a terminal."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gymtrl.comparison.record import Candidate, Comparison, Effect, Flip
from gymtrl.doctor.worse import diagnose_comparison
from gymtrl.reports.finding import render_each
from gymtrl.text import plain

_SHOWN = 3
_COLOURS = {"improved": "green", "regressed": "red", "not shown": "yellow"}


def comparison_json(comparison: Comparison) -> str:
    """Returns the comparison, with what `doctor` finds in it as `findings`, as one JSON document."""
    told = msgspec.to_builtins(comparison) | {"findings": msgspec.to_builtins(diagnose_comparison(comparison))}
    return msgspec.json.format(msgspec.json.encode(told), indent=2).decode() + "\n"


def render_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints for each candidate means, intervals, tests, costs, flips, what has no partner and the verdict.

    What training made worse comes last.
    """
    console = console or Console()
    before = comparison.before
    console.print(f"{escape(comparison.metric)} of {_name(before.name)}, {before.rollouts:,} rollouts", soft_wrap=True)
    for candidate in comparison.candidates:
        after = candidate.after
        console.print(f"against {_name(after.name)}, {after.rollouts:,} rollouts", soft_wrap=True)
        _render_effects(candidate, console, 100.0 if comparison.points else 1.0)
        _render_tests(candidate.overall, console, 100.0 if comparison.points else 1.0)
        _render_costs(candidate, console)
        _render_flips(candidate, console)
        _render_left_out(comparison, candidate, console)
        console.print(_coloured(candidate), soft_wrap=True)
    render_each(diagnose_comparison(comparison), console)


def _render_effects(candidate: Candidate, console: Console, scale: float) -> None:
    unit = "points" if scale != 1 else "difference"
    table = Table("", "tasks", "before", "after", unit, "95 % interval", "p", "fixed", "broken", "", box=None)
    environments = candidate.environments if len(candidate.environments) > 1 else ()
    for effect in (*environments, candidate.overall):
        d = effect.difference
        name = plain(effect.environment) or ("all" if environments else "")
        table.add_row(
            Text(name),
            f"{d.n:,}",
            f"{effect.before.mean:.3f}",
            f"{effect.after.mean:.3f}",
            _signed(d.mean, scale),
            f"{_signed(d.low, scale)} to {_signed(d.high, scale)}",
            f"{effect.p_adjusted:.2g}",
            str(effect.fixed),
            str(effect.broken),
            Text(effect.outcome, style=_COLOURS[effect.outcome]),
        )
    console.print(table)
    if environments:
        console.print("p and outcome of each environment allow for there being several (Holm)")


def _render_tests(effect: Effect, console: Console, scale: float) -> None:
    low, high = effect.bootstrap
    parts = [
        f"{effect.better} tasks better, {effect.worse} worse, {effect.equal} equal, in {effect.difference.clusters} "
        "clusters",
        f"bootstrap {_signed(low, scale)} to {_signed(high, scale)}",
        f"sign flips p = {effect.sign_flip_p:.2g}",
    ]
    if effect.mcnemar_p is not None:
        parts.append(f"McNemar p = {effect.mcnemar_p:.2g}")
    console.print("; ".join(parts), soft_wrap=True)
    if len(effect.pass_at) > 1:
        table = Table("", "tasks", "before", "after", "95 % interval", "pass@1 of these tasks", box=None)
        for at in effect.pass_at:
            d = at.difference
            interval = f"{d.low * 100:+.1f} to {d.high * 100:+.1f}" if d is not None else ""
            table.add_row(
                f"pass@{at.k}",
                f"{at.tasks:,}",
                f"{at.before:.3f}",
                f"{at.after:.3f}",
                interval,
                f"{at.one_before:.3f} → {at.one_after:.3f}",
            )
        console.print(table)


def _render_costs(candidate: Candidate, console: Console) -> None:
    table = Table("a rollout", "before", "after", "95 % interval of the difference", box=None)
    for cost in candidate.costs:
        d = cost.difference
        table.add_row(cost.name, f"{cost.before:,.4g}", f"{cost.after:,.4g}", f"{d.low:+,.3g} to {d.high:+,.3g}")
    console.print(table)


def _render_flips(candidate: Candidate, console: Console) -> None:
    questions = {(task.environment, task.key): task.question for task in candidate.tasks}
    for kind in ("broken", "fixed"):
        flips = [flip for flip in candidate.flips if flip.kind == kind]
        if flips:
            console.print(f"{kind}, {min(len(flips), _SHOWN)} of {len(flips)}:")
        for flip in flips[:_SHOWN]:
            question = " ".join(questions[flip.environment, flip.key].split())[:80]
            console.print(Text(f"  {plain(question)}\n    {_places(flip)}"), soft_wrap=True)


def _places(flip: Flip) -> str:
    return plain(f"{flip.before[0]} → {flip.after[0]}")


def _render_left_out(comparison: Comparison, candidate: Candidate, console: Console) -> None:
    for unpaired in candidate.unpaired:
        words = f"no partner: {unpaired.tasks} tasks {unpaired.detail}, such as {unpaired.examples[0]}"
        console.print(Text(plain(words)), soft_wrap=True)
    for word, side in (("before", comparison.before), ("after", candidate.after)):
        if side.refused:
            console.print(f"{side.refused} rollouts {word} whose answer is no sound chat count with their reward")
        if side.failed_attempts:
            listed = ", ".join(f"{name} {number}" for name, number in sorted(side.failed_attempts.items()))
            console.print(Text(plain(f"attempts {word} that the world failed, not counted: {listed}")), soft_wrap=True)
    for warning in candidate.warnings:
        console.print(f"[yellow]warning:[/] {escape(plain(warning))}", soft_wrap=True)


def _coloured(candidate: Candidate) -> Text:
    return Text(plain(candidate.verdict), style=f"bold {_COLOURS[candidate.outcome]}")


def _name(name: str) -> str:
    return escape(plain(name))


def _signed(value: float, scale: float) -> str:
    return f"{value * scale:+.1f}" if scale != 1 else f"{value:+.3g}"
