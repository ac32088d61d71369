"""`gymtrl power`"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Stage, stage_options
from gymtrl.comparison.power_settings import PowerSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("power")(power)


@stage_options(PowerSettings, "power")
def power(
    rollouts: Annotated[Path, typer.Argument(help="Rollouts of tasks like those to be compared (JSONL).")],
    after: Annotated[
        Path | None, typer.Argument(help="Rollouts of the same tasks by another model: the answer then assumes less.")
    ] = None,
    *,
    stage: Stage,
) -> None:
    """Tell how many tasks and repeats show a difference, from the variance in your own rollouts."""
    from gymtrl.comparison.power_plan import plan_power
    from gymtrl.reports.power import power_json, render_power
    from gymtrl.workspace.spool import spooled

    with tempfile.TemporaryDirectory() as folder:
        before, second = (spooled([path] if path else [], Path(folder)) for path in (rollouts, after))
        plan = plan_power(before, second, settings=stage.settings)
    if stage.json:
        sys.stdout.write(power_json(plan))
    else:
        render_power(plan)
