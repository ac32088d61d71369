"""Gym's own collection, `gym eval run`, as a child process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gymtrl.gym.servers import OwnGym
from gymtrl.gym.settings import CollectSettings
from gymtrl.processes import Supervised

_START_SECONDS = 180.0  # its imports, on a busy machine
_STOP_SECONDS = 5.0


def run_collection(
    own: OwnGym,
    out: Path,
    settings: CollectSettings,
    *,
    watch: Callable[[], None],
    report: Callable[[int], None],
) -> None:
    """Has Gym collect what `out` lacks of the inputs beside it, until it is done, fails, or gets no further.

    Rollouts are in `out` as soon as they are done, so that nothing is lost however this ends; `collect.log` in Gym's
    folder tells how it did.

    Args:
        own (`OwnGym`): A Gym that runs.
        out (`Path`): The rollouts file, with its materialized inputs beside it.
        settings (`CollectSettings`): Concurrency and time-out.
        watch (`Callable[[], None]`): Called about twice a second; what it raises ends the collection.
        report (`Callable[[int], None]`): Called with the rollouts that were added.
    """
    out.touch()
    inputs = out.with_name(f"{out.stem}_materialized_inputs.jsonl")
    command = [str(own.command), "eval", "run", "--no-serve", "--resume"]
    command += ["--input", _quoted(inputs), "--output", _quoted(out), "--concurrency", str(settings.concurrency)]
    # Metrics over all rollouts are made from the file; here they would be of what this run alone got.
    command += ["+disable_aggregation=true", "+upload_rollouts_to_wandb=false"]
    added, moved = 0, time.monotonic()
    with (
        out.open("rb") as lines,
        Supervised(
            command, log=own.folder / "collect.log", env=own.environment, cwd=own.folder, grace=_STOP_SECONDS
        ) as process,
    ):
        lines.seek(0, 2)
        while process.exit_code() is None:
            watch()
            if new := lines.read().count(b"\n"):
                added, moved = added + new, time.monotonic()
                report(added)
            # With no rollout done for that long, all under way have had their time.
            if time.monotonic() - moved > settings.timeout + (0.0 if added else _START_SECONDS):
                return
            time.sleep(0.5)
        watch()  # a collection that ended because Gym died


def _quoted(path: Path) -> str:
    """A path as a value of Hydra's grammar, in which many characters of paths mean something."""
    escaped = str(path.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
