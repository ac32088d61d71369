"""Running a stage once: not again while its folder matches its inputs and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from gymtrl.workspace.artefact import Manifest, read_manifest, up_to_date


def once(
    out: Path, *, verb: str, settings: BaseModel, inputs: Sequence[Path], work: Callable[[], object]
) -> tuple[Manifest, bool]:
    """Calls `work`, which writes `out`, unless `out` is up to date.

    Returns:
        `tuple[Manifest, bool]`: The folder's manifest, and whether `work` was called.
    """
    manifest = up_to_date(out, verb=verb, settings=settings, inputs=inputs)
    if manifest is not None:
        return manifest, False
    work()
    return read_manifest(out), True
