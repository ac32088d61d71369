"""`gymtrl doctor`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gymtrl.cli.options import Json


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("doctor")(doctor)


def doctor(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, finished or interrupted.")],
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
    """Say what is wrong with a training run: the evidence, the likely cause, and what to do."""
    from gymtrl.doctor.diagnose import diagnose, with_told
    from gymtrl.doctor.finding import read_findings
    from gymtrl.doctor.read import read_run, run_folder, unfinished
    from gymtrl.reports.doctor import findings_json, render_findings, render_unfinished

    record, folder = read_run(run), run_folder(run)
    findings = with_told(diagnose(record, "after"), read_findings(folder / "findings.json"))
    partial = unfinished(run)
    if partial is not None and partial != folder:
        render_unfinished(run, partial)
    if as_json:
        sys.stdout.write(findings_json(findings))
    else:
        render_findings(record, findings)
    failing = {"error": ("error",), "warning": ("error", "warning")}.get(fail_on or "", ())
    raise typer.Exit(int(any(finding.severity in failing for finding in findings)))
