"""`gymtrl validate`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
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
    from gymtrl.comparison.verdict import exit_status
    from gymtrl.reports.comparison import comparison_json, render_comparison
    from gymtrl.reports.progress import watch
    from gymtrl.validation.validate import read_comparison, validate_inputs
    from gymtrl.validation.validate import validate as run
    from gymtrl.workspace.stage import once

    inputs = validate_inputs(checkpoint, stage.settings)
    folder = out or default_out([checkpoint or inputs[-1]], "validation")
    with watch() as progress:
        once(
            folder,
            verb="validate",
            settings=stage.settings,
            inputs=inputs,
            work=lambda: run(checkpoint, folder, stage.settings, progress=progress),
        )
    comparison = read_comparison(folder)
    if stage.json:
        sys.stdout.write(comparison_json(comparison))
    else:
        render_comparison(comparison)
    raise typer.Exit(exit_status(comparison, stage.settings.fail_on))
