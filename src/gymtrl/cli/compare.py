"""`gymtrl compare`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Stage, stage_options
from gymtrl.comparison.settings import CompareSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("compare")(compare)


@stage_options(CompareSettings, "compare")
def compare(
    before: Annotated[Path, typer.Argument(help="Rollouts before (JSONL), or a folder of them.")],
    after: Annotated[list[Path], typer.Argument(help="Rollouts after, of the same tasks; several are candidates.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to keep the comparison in; printed only if not given.")
    ] = None,
    *,
    stage: Stage,
) -> None:
    """Compare collections of the same tasks: paired difference, cluster-robust interval, flips, costs, verdict."""
    from gymtrl.comparison.verdict import exit_status
    from gymtrl.reports.comparison import comparison_json, render_comparison
    from gymtrl.validation.validate import compare_rollouts

    comparison = compare_rollouts(before, after, stage.settings, out=out)
    if stage.json:
        sys.stdout.write(comparison_json(comparison))
    else:
        render_comparison(comparison)
    raise typer.Exit(exit_status(comparison, stage.settings.fail_on))
