"""Findings of `doctor`, for a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from gymtrl.comparison.record import Comparison
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.run import RunRecord
from gymtrl.reports.finding import render_each
from gymtrl.text import plain


def findings_json(findings: Sequence[Finding]) -> str:
    """Returns the findings as one JSON document."""
    return json.dumps([asdict(finding) for finding in findings], indent=2) + "\n"


def render_findings(record: RunRecord, findings: Sequence[Finding], console: Console | None = None) -> None:
    """Prints what was looked at and every finding with its evidence, cause and remedy."""
    console = console or Console()
    of = f" of {record.planned_steps:,}" if record.planned_steps else ""
    seen = f"{record.objective}, {record.method}: {len(record.steps):,}{of} steps, {len(record.evals)} evaluations"
    console.print(Text(plain(seen)))
    _render(findings, console)


def render_change(comparison: Comparison, findings: Sequence[Finding], console: Console | None = None) -> None:
    """Prints the verdict of a comparison and every finding about it."""
    console = console or Console()
    console.print(Text(plain(comparison.verdict)), soft_wrap=True)
    _render(findings, console)


def render_unfinished(run: Path, partial: Path) -> None:
    """Prints, to standard error, that a run was begun anew and is not the one that is told of."""
    words = f"{run} is being trained anew, or was interrupted in it: 'gymtrl doctor {partial}' tells of the new run"
    Console(stderr=True).print(Text(plain(words)), soft_wrap=True)


def _render(findings: Sequence[Finding], console: Console) -> None:
    render_each(findings, console)
    if not findings:
        console.print(Text("nothing found", style="green"))
