"""What the trainers for preferences share: rows that are tokenized and masked already, checked and put into batches.

A side of a row is a list of ids that follows the prompt, with a mask of the same length: `chosen_ids` and
`chosen_mask`, or `completion_ids` and `completion_mask`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from gymtrl.errors import UserError

_AGAIN = "make the dataset again"


def token_columns(
    dataset: Dataset, split: str, sides: Sequence[str], others: Sequence[str], max_length: int | None
) -> Dataset:
    """Checks the token columns of a split and leaves out all others.

    The columns for people are left out because mapping the dataset would rewrite them, which costs time and digits.

    Args:
        dataset (`Dataset`): With `prompt_ids` and, for each side, its ids and mask.
        split (`str`): Its name, for messages.
        sides (`Sequence[str]`): Sides of a row.
        others (`Sequence[str]`): Further columns to keep.
        max_length (`int`, *optional*): Most tokens of the prompt with one side.

    Returns:
        `Dataset`: The rows in their order, nothing cut and none dropped.

    Raises:
        UserError: A stream, a missing column, or a row that cannot be trained on as it is: it is too long, has a mask
            of another length, or has none of its tokens marked for loss.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"the {split} rows are no datasets.Dataset: what is streamed cannot be checked before training",
            remedy="load the folder without streaming",
        )
    kept = ["prompt_ids", *(f"{side}_{part}" for side in sides for part in ("ids", "mask")), *others]
    missing = [column for column in kept if column not in dataset.column_names]
    if missing:
        raise UserError(
            f"the {split} rows have no column '{missing[0]}'",
            remedy="give rows of a dataset folder made for this trainer; TRL's own trainers take text",
        )
    places = [name for side in ("", *(f"{side}_" for side in sides)) for name in (f"{side}file", f"{side}line")]
    wanted = kept + [name for name in places if name in dataset.column_names]
    start = 0
    for table in dataset.select_columns(wanted).with_format("arrow").iter(batch_size=1000):
        for side in sides:
            _check(table, split, start, side, max_length)
        start += len(table)
    return dataset.select_columns(kept)


def padded(masks: Iterable[list[int]], ids: torch.Tensor) -> torch.Tensor:
    """Brings masks to the shape of their padded ids; what is padding carries no loss.

    Args:
        masks (`Iterable[list[int]]`): One for each row of `ids`.
        ids (`torch.Tensor`): Padded on the right.
    """
    made = torch.zeros_like(ids)
    for row, mask in zip(made, masks, strict=True):
        row[: len(mask)] = torch.tensor(mask)
    return made


def _check(table: pa.Table, split: str, start: int, side: str, max_length: int | None) -> None:
    ids, mask = _lengths(table, f"{side}_ids"), _lengths(table, f"{side}_mask")
    marks = table.column(f"{side}_mask").combine_chunks()
    loss = np.bincount(pc.list_parent_indices(marks), pc.list_flatten(marks), minlength=len(table))
    total = _lengths(table, "prompt_ids") + ids
    for at in np.flatnonzero((ids != mask) | (loss == 0) | (total > (max_length or np.inf))):
        place = _place(table, split, start, side, int(at))
        if ids[at] != mask[at]:
            raise UserError(f"{place}: {side}_mask has {mask[at]} entries for {ids[at]} ids", remedy=_AGAIN)
        if loss[at] == 0:
            raise UserError(f"{place}: no token of {side}_ids carries loss", remedy=_AGAIN)
        raise UserError(
            f"{place}: {total[at]} tokens, more than max_length={max_length}; nothing is cut here",
            remedy="set max_length=None in the trainer's arguments, or make the dataset with a smaller max_length",
        )


def _lengths(table: pa.Table, column: str) -> np.ndarray[Any, Any]:
    lengths: np.ndarray[Any, Any] = pc.fill_null(pc.list_value_length(table.column(column)), 0).to_numpy()
    return lengths


def _place(table: pa.Table, split: str, start: int, side: str, at: int) -> str:
    for prefix in (f"{side}_", ""):
        if {f"{prefix}file", f"{prefix}line"} <= set(table.column_names):
            file, line = table.column(f"{prefix}file")[at].as_py(), table.column(f"{prefix}line")[at].as_py()
            return f"{split} row {start + at} ({file}:{line})"
    return f"{split} row {start + at}"
