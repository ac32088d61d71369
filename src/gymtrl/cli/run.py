"""Running a stage for a person: skipped when up to date, its manifest shown at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel


def run_stage(
    out: Path,
    *,
    verb: str,
    settings: BaseModel,
    inputs: Sequence[Path],
    work: Callable[[], object],
    as_json: bool,
    finish: Callable[[], object] = lambda: None,
    show: Callable[[], object] | None = None,
) -> None:
    """Runs `work` unless `out` was made from the same inputs and settings; then has it finished, and shows it."""
    from gymtrl.reports.stage import render_manifest
    from gymtrl.workspace.stage import once

    manifest, ran = once(out, verb=verb, settings=settings, inputs=inputs, work=work)
    finish()
    if not ran:
        print(f"{out} is up to date", file=sys.stderr)
    if as_json:
        sys.stdout.write((out / "manifest.json").read_text())
    elif show is not None:
        show()
    else:
        render_manifest(out, manifest)
