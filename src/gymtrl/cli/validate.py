"""`gymtrl validate`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.text import plain
from gymtrl.validation.settings import ValidateSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("validate")(validate)


@stage_options(ValidateSettings, "validate")
def validate(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Folder that 'train' wrote, a model or an adapter folder; none with --endpoint."),
    ] = None,
    out: Out = None,
    *,
    stage: Stage,
) -> None:
    """Try a checkpoint and its baseline on held-out tasks in Gym, and compare what they did."""
    from rich.console import Console

    from gymtrl.comparison.verdict import exit_status
    from gymtrl.pipeline.steps import validate_step
    from gymtrl.reports.comparison import comparison_json, render_comparison
    from gymtrl.reports.comparison_page import REPORT
    from gymtrl.validation.validate import read_comparison, validate_inputs
    from gymtrl.workspace.stage import once

    inputs = validate_inputs(checkpoint, stage.settings)
    folder = out or default_out([checkpoint or inputs[-1]], "validation")
    step = validate_step(checkpoint, folder, stage.settings)
    once(
        folder,
        verb=step.verb,
        settings=step.settings,
        inputs=step.inputs(),
        work=lambda: step.work(Console(stderr=True)),
    )
    step.finish()
    comparison = read_comparison(folder)
    if stage.json:
        sys.stdout.write(comparison_json(comparison))
    else:
        render_comparison(comparison)
    print(f"→ {plain(str(folder / REPORT))}", file=sys.stderr)
    raise typer.Exit(exit_status(comparison, stage.settings.fail_on))
