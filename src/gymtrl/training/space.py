"""Disk space: what a run will need, and whether it is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import RunError

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
    """

    weights: int
    trained: int
    weight_bytes: int


def bytes_needed(sizes: Sizes, *, lora: bool, tokens: int = 0) -> int:
    """Estimates the most that a run holds on disk at once.

    A checkpoint holds the trained weights and AdamW's two moments, each in float32. Three of them exist for a moment: a
    new one is complete before the oldest goes. Adapter and merged model are written before the checkpoints go, too.

    Args:
        sizes (`Sizes`): Of the model.
        lora (`bool`): An adapter is trained.
        tokens (`int`): Tokens of the dataset, of all splits, of which a copy is kept during the run.
    """
    checkpoint = 3 * 4 * sizes.trained
    adapter = 4 * sizes.trained if lora else 0
    return 3 * checkpoint + adapter + sizes.weights * sizes.weight_bytes + TOKEN_BYTES * tokens + SPARE_BYTES


def require_space(folder: Path, needed: int) -> None:
    """Checks that the file system of `folder` has room for `needed` bytes, what the folder holds already included.

    Raises:
        RunError: It has not.
    """
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        raise RunError(
            f"training needs {_size(needed)} in {folder.parent}, and {_size(free + held)} are free",
            remedy=f"free {_size(needed - free - held)}, or choose a folder on another disk with -o",
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
