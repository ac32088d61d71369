"""`gymtrl inspect`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Json, Rollouts


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("inspect")(inspect_)


def inspect_(
    rollouts: Rollouts,
    table: Annotated[
        Path | None, typer.Option("--table", help="Write the rollout table, one row per line, as Parquet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in rollout files: rewards, groups, tools, lengths, every problem, and what they are good for."""
    import tempfile

    from rich.console import Console

    from gymtrl.reports.inspection import render, summary_json
    from gymtrl.rollouts.inspection import inspect_rollouts
    from gymtrl.workspace.spool import spooled

    with tempfile.TemporaryDirectory() as folder:
        summary = inspect_rollouts(spooled(rollouts, Path(folder)), table=table)
    if as_json:
        sys.stdout.write(summary_json(summary))
    else:
        render(summary, Console())
