"""Checkpoints that can be trusted: each is sealed when it is complete, and only sealed ones are resumed from."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from gymtrl.training.job import OUTCOME, Outcome, write_json

_SEAL = "sealed.json"
_disk = ThreadPoolExecutor(max_workers=1)


class Seal(TrainerCallback):  # type: ignore[misc]  # transformers has no complete types
    """Seals each checkpoint once all of it is on disk: a list of its files with their sizes, written last.

    A disk may take seconds for what was written: training goes on meanwhile, up to the next checkpoint, which lets the
    trainer delete the one before.
    """

    def __init__(self) -> None:
        self._sealing: Future[None] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _meet()  # each process writes a part of it
        if state.is_world_process_zero:
            self._sealing = _disk.submit(_seal, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save or control.should_training_stop:
            self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self._wait()
        finally:
            _meet()  # all see it sealed that go on from here

    def _wait(self) -> None:
        """Until the last checkpoint is sealed; raises what kept it from being so."""
        if self._sealing is not None:
            self._sealing.result()


def _meet() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _seal(folder: Path) -> None:
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SEAL):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # a seal must not outlive a power cut that its files do not
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    partial = folder / f".{_SEAL}"
    partial.write_text(json.dumps(sizes), encoding="utf-8")
    partial.replace(folder / _SEAL)


class SaveLast(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Has the step saved at which training stops, also where that is not the last one, and why it stops there.

    Comes after all who stop it.

    Args:
        trainer (`Trainer`): Its `stop_reason` is kept, where it has one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        """What the trainer writes into its own state, and so into the sealed part of a checkpoint."""
        return {"args": {}, "attributes": {"stop_reason": getattr(self._trainer, "stop_reason", None)}}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or control.should_training_stop


def last_sealed(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint below `folder`."""
    return max((path for path in _checkpoints(folder) if _is_whole(path)), key=step_of, default=None)


def drop_torn(folder: Path) -> None:
    """Deletes the checkpoints below `folder` that are not whole, which no run can use. One process does it."""
    _disk.submit(int).result()  # what this process is sealing is not torn
    for path in _checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def has_all_steps(checkpoint: Path) -> bool:
    """Whether a checkpoint was written after the last step of its run, planned or not."""
    state = _trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"]) or stop_reason(checkpoint) is not None


def stop_reason(checkpoint: Path) -> str | None:
    """Why training stopped at a checkpoint, before its last step; `None` where it did not."""
    saved: dict[str, Any] = _trainer_state(checkpoint)["stateful_callbacks"].get(SaveLast.__name__, {})
    found: str | None = saved.get("attributes", {}).get("stop_reason")
    return found


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def mark_final(checkpoint: Path, outcome: Outcome) -> None:
    """Says beside a checkpoint that training ended with it, and what was measured."""
    write_json(checkpoint / OUTCOME, outcome)


def is_final(checkpoint: Path) -> bool:
    """Whether training ended with a checkpoint and all was measured."""
    return (checkpoint / OUTCOME).is_file()


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / _SEAL).read_text(encoding="utf-8"))
        return bool(sizes) and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
