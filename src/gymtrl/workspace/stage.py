"""Running a stage once: not again while its folder matches its inputs and settings; and where stages write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel

from gymtrl.workspace.artefact import Manifest, read_manifest, up_to_date


def once(
    out: Path,
    *,
    verb: str,
    settings: BaseModel,
    inputs: Sequence[Path],
    work: Callable[[], object],
    anew: bool = False,
) -> tuple[Manifest, bool]:
    """Calls `work`, which writes `out`, unless `out` is up to date and is not asked for `anew`.

    Returns:
        `tuple[Manifest, bool]`: The folder's manifest, and whether `work` was called.
    """
    manifest = None if anew else up_to_date(out, verb=verb, settings=settings, inputs=inputs)
    if manifest is not None:
        return manifest, False
    work()
    return read_manifest(out), True


def job_folder(rollouts: Path) -> Path:
    """Returns where the stages of a job write unless the user names a folder: `runs/<name of the rollouts>`."""
    name = rollouts.resolve().stem if str(rollouts) != "-" else "stdin"
    generic = name in ("rollouts", "results")
    return Path("runs") / (rollouts.resolve().parent.name if generic else name)
