"""`gymtrl filter`"""

from __future__ import annotations

import typer

from gymtrl.cli.options import Out, Rollouts, Stage, default_out, stage_options
from gymtrl.selection.settings import FilterSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("filter")(filter_)


@stage_options(FilterSettings, "filter")
def filter_(rollouts: Rollouts, out: Out = None, *, stage: Stage) -> None:
    """Keep the rollouts that are worth training on; say why the rest is not; hold tasks out for validation."""
    from gymtrl.cli.run import run_stage
    from gymtrl.rollouts.inputs import expand_inputs
    from gymtrl.selection.filter import files_read, filter_rollouts
    from gymtrl.workspace.spool import spooled

    folder = out or default_out(rollouts, "filter")
    files = expand_inputs(spooled(rollouts, folder.parent))
    run_stage(
        folder,
        verb="filter",
        settings=stage.settings,
        inputs=files_read(files),
        work=lambda: filter_rollouts(files, folder, stage.settings),
        as_json=stage.json,
    )
