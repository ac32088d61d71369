"""Disk space: what a run will need, and whether it is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import RunError
from gymtrl.training.fit import size
from gymtrl.training.memory import ModelShape

TOKEN_BYTES = 8
"""A token's id and label, four bytes each, in the uncompressed copy that `datasets` maps into memory."""

SPARE_BYTES = 64 * 2**20
"""For logs, tokenizer files and whatever else a run writes."""


@dataclass(frozen=True)
class Sizes:
    """Weights of a run.

    Attributes:
        weights (`int`): All weights of the model.
        trained (`int`): Weights that are trained: of the adapter, or all.
        weight_bytes (`int`): Bytes of a weight in the model that is saved at the end.
        again (`int`, *optional*, defaults to `0`): Weights that a checkpoint holds a second time.
        tokenizer (`int`, *optional*, defaults to `0`): Bytes of the tokenizer's files.
    """

    weights: int
    trained: int
    weight_bytes: int
    again: int = 0
    tokenizer: int = 0


@dataclass(frozen=True)
class Room:
    """Disk space that a run needs.

    Attributes:
        checkpoint (`int`): Bytes of one checkpoint.
        run (`int`): Bytes of the most that it holds at once.
    """

    checkpoint: int
    run: int


def sizes_of(shape: ModelShape, *, rank: int | None, divided: bool, tokenizer: int) -> Sizes:
    """Counts the weights of a run.

    Args:
        shape (`ModelShape`): Of the model.
        rank (`int`, *optional*): Of the adapter; `None` where every weight is trained.
        divided (`bool`): The processes share the model in parts. A checkpoint then holds the weights once for those who
            load it and once for the processes to find their parts in, and tied ones twice in each.
        tokenizer (`int`): Bytes of the tokenizer's files.
    """
    trained = shape.weights if rank is None else rank * (shape.linear_inputs + shape.linear_outputs)
    tied = 2 * shape.vocabulary * shape.hidden if rank is None and shape.tied else 0
    return Sizes(shape.weights, trained, shape.stored_bytes, trained + tied if divided else 0, tokenizer)


def room_needed(sizes: Sizes, *, lora: bool, tokens: int = 0) -> Room:
    """Estimates the most that a run holds on disk at once.

    A checkpoint holds the trained weights and AdamW's two moments, each in float32, and the tokenizer. Three of them
    exist for a moment: a new one is complete before the oldest goes. Adapter and merged model are written before the
    checkpoints go, too.

    Args:
        sizes (`Sizes`): Of the model.
        lora (`bool`): An adapter is trained.
        tokens (`int`): Tokens of the dataset, of all splits, of which a copy is kept during the run.
    """
    checkpoint = 4 * (3 * sizes.trained + sizes.again) + sizes.tokenizer
    made = (4 * sizes.trained if lora else 0) + sizes.weights * sizes.weight_bytes + sizes.tokenizer
    return Room(checkpoint, 3 * checkpoint + made + TOKEN_BYTES * tokens + SPARE_BYTES)


def require_space(folder: Path, needed: int) -> None:
    """Checks that the file system of `folder` has room for `needed` bytes, what the folder holds already included.

    Raises:
        RunError: It has not.
    """
    _, lacking = _free_and_lacking(folder, needed)
    if lacking > 0:
        raise RunError(
            f"training needs {size(needed)} in {folder.parent}, and {size(needed - lacking)} are free",
            remedy=f"free {size(lacking)}, or choose a folder on another disk with -o",
        )


def disk_full(folder: Path, room: Room, why: str | None) -> RunError:
    """What to say of a run whose disk became full while it trained.

    Args:
        folder (`Path`): Of the run in the making.
        room (`Room`): What it needs.
        why (`str`, *optional*): The failure in the words of who met it; there may have been no room for them.
    """
    free, lacking = _free_and_lacking(folder, room.run)
    wanted = max(lacking, room.checkpoint - free)
    return RunError(
        f"the disk is full: {folder.parent} has {size(free)} left, and a checkpoint takes {size(room.checkpoint)}"
        + (f" ({why})" if why else ""),
        remedy=(f"free {size(wanted)} there" if wanted > 0 else "see that there stays room")
        + " and run it again, to go on from the last checkpoint; or begin anew on another disk with -o",
    )


def _free_and_lacking(folder: Path, needed: int) -> tuple[int, int]:
    """Free bytes, and those that lack of `needed` beside what the folder holds."""
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    return free, needed - free - held
