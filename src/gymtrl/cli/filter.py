"""`gymtrl filter`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, print_resolved, resolved_values, stage_options
from gymtrl.selection.settings import FilterSettings
from gymtrl.workspace.settings import Resolved

Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Rollout files (JSONL), or folders of them, or one table of 'gymtrl inspect --table'; '-' reads standard "
        "input."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("filter")(filter_)


def _preview(resolved: Resolved[FilterSettings], *, as_json: bool, rollouts: list[Path], out: Path | None) -> None:
    import tempfile

    from gymtrl.reports.reading import watch_reading
    from gymtrl.reports.selection import preview_json, render_preview
    from gymtrl.rollouts.inputs import expand_inputs
    from gymtrl.selection.funnel import preview_filter
    from gymtrl.workspace.spool import spooled

    with tempfile.TemporaryDirectory() as folder:
        files = expand_inputs(spooled(rollouts, Path(folder)))
        with watch_reading(files) as on_bytes:
            preview = preview_filter(files, Path(folder), resolved.settings, on_bytes=on_bytes)
    if as_json:
        sys.stdout.write(preview_json(resolved_values(resolved), preview))
    else:
        print_resolved(resolved, as_json=False)
        print()
        render_preview(preview)


@stage_options(FilterSettings, "filter", preview=_preview)
def filter_(rollouts: Inputs, out: Out = None, *, stage: Stage) -> None:
    """Keep the rollouts that are worth training on; say why the rest is not; hold tasks out for validation."""
    from gymtrl.cli.run import run_stage
    from gymtrl.reports.reading import watch_reading
    from gymtrl.rollouts.inputs import expand_inputs, expand_patterns
    from gymtrl.selection.filter import FilterResult, files_read, filter_rollouts
    from gymtrl.workspace.spool import spooled

    rollouts = expand_patterns(rollouts)
    folder = out or default_out(rollouts, "filter")
    files = expand_inputs(spooled(rollouts, folder.parent))

    def work() -> FilterResult:
        with watch_reading(files) as on_bytes:
            return filter_rollouts(files, folder, stage.settings, on_bytes=on_bytes)

    run_stage(
        folder,
        verb="filter",
        settings=stage.settings,
        inputs=files_read(files, stage.settings),
        work=work,
        as_json=stage.json,
    )
