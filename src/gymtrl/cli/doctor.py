"""`gymtrl doctor`"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gymtrl.cli.options import Json

if TYPE_CHECKING:
    from gymtrl.doctor.finding import Finding


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("doctor")(doctor)


def doctor(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What 'train' wrote, finished or not, or 'compare' or 'validate'."),
    ],
    train_tasks: Annotated[
        Path | None,
        typer.Option(
            "--train-tasks",
            help="Folder of a comparison of the same models on tasks that were trained on: is the gain learned by "
            "heart? For a comparison only.",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        Literal["error", "warning"] | None,
        typer.Option(
            "--fail-on",
            help="End with status 1 if there is an error, or with 'warning' also if there is a warning.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a training run, or what it made worse: the evidence, the likely cause, and what to do."""
    from gymtrl.comparison.record import COMPARISON
    from gymtrl.reports.doctor import findings_json

    compared = train_tasks is not None or (folder / COMPARISON).is_file()
    findings, render = _of_comparison(folder, train_tasks) if compared else _of_run(folder)
    if as_json:
        sys.stdout.write(findings_json(findings))
    else:
        render()
    failing = {"error": ("error",), "warning": ("error", "warning")}.get(fail_on or "", ())
    raise typer.Exit(int(any(finding.severity in failing for finding in findings)))


def _of_run(run: Path) -> tuple[list[Finding], Callable[[], None]]:
    """What is wrong with a run, and what prints it."""
    from gymtrl.doctor.diagnose import diagnose, with_told
    from gymtrl.doctor.finding import read_findings
    from gymtrl.doctor.read import read_run, run_folder, unfinished
    from gymtrl.reports.doctor import render_findings, render_unfinished

    record, folder = read_run(run), run_folder(run)
    findings = with_told(diagnose(record, "after"), read_findings(folder / "findings.json"))
    partial = unfinished(run)
    if partial is not None and partial != folder:
        render_unfinished(run, partial)
    return findings, lambda: render_findings(record, findings)


def _of_comparison(folder: Path, train_tasks: Path | None) -> tuple[list[Finding], Callable[[], None]]:
    """What training made worse, and what prints it."""
    from gymtrl.doctor.worse import diagnose_comparison
    from gymtrl.reports.doctor import render_change
    from gymtrl.validation.validate import read_comparison

    comparison = read_comparison(folder)
    findings = diagnose_comparison(comparison, read_comparison(train_tasks) if train_tasks else None)
    return findings, lambda: render_change(comparison, findings)
