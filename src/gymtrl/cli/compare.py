"""`gymtrl compare`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Json
from gymtrl.cli.validate import FailOn


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("compare")(compare)


def compare(
    before: Annotated[Path, typer.Argument(help="Rollouts before (JSONL).")],
    after: Annotated[Path, typer.Argument(help="Rollouts after, of the same tasks (JSONL).")],
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="JSON path whose value names a task's cluster, as given to filter.")
    ] = None,
    fail_on: FailOn = None,
    as_json: Json = False,
) -> None:
    """Compare two collections of the same tasks: paired difference, cluster-robust interval, flips, verdict."""
    import msgspec

    from gymtrl.comparison.compare import compare_files
    from gymtrl.comparison.outcome import check_outcome
    from gymtrl.reports.comparison import render_comparison

    check_outcome(None, fail_on)
    comparison = compare_files([before], [after], cluster=cluster)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode() + "\n")
    else:
        render_comparison(comparison)
    raise typer.Exit(check_outcome(comparison, fail_on))
