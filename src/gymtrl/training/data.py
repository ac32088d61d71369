"""What training needs to know about a dataset folder before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import Fingerprint
from gymtrl.workspace.artefact import Manifest, read_manifest

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100


@dataclass(frozen=True)
class Sequence:
    """One sequence that a row gives the model.

    Attributes:
        ids (`tuple[str, ...]`): Columns whose token ids follow each other.
        loss (`str`): Column of the last of them that says which of its tokens carry loss: labels, or a mask.
    """

    ids: tuple[str, ...]
    loss: str

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of it."""
        return (*self.ids, self.loss)


@dataclass(frozen=True)
class Split:
    """The tokens of one split, counted.

    Attributes:
        files (`tuple[Path, ...]`): Its Parquet files, in order.
        rows (`int`): Rows.
        tokens (`int`): Tokens of all sequences.
        loss_tokens (`int`): Tokens that carry loss and have one before them to be predicted from.
        longest (`int`): Tokens of the longest sequence.
        longest_row (`int`): Number of the row that it stands in.
        largest_id (`int`): The largest token id.
    """

    files: tuple[Path, ...]
    rows: int
    tokens: int
    loss_tokens: int
    longest: int
    longest_row: int
    largest_id: int


@dataclass(frozen=True)
class TrainingData:
    """A dataset folder that has passed its checks.

    Attributes:
        manifest (`Manifest`): Of the folder.
        model (`str`): The model that the tokens were made for.
        fingerprint (`Fingerprint`): Of that model's tokenizer and template.
        train (`Split`): Training rows.
        validation (`Split`, *optional*): Validation rows.
    """

    manifest: Manifest
    model: str
    fingerprint: Fingerprint
    train: Split
    validation: Split | None


def dataset_manifest(dataset: Path) -> Manifest:
    """Reads the manifest of a dataset folder, whose `extra` names the `model` and its `fingerprint`.

    Raises:
        UserError: No such folder, or it is no dataset.
    """
    manifest = read_manifest(dataset)
    if not isinstance(manifest.extra.get("fingerprint"), dict) or "model" not in manifest.extra:
        raise UserError(
            f"{dataset} is no dataset: its manifest names no tokenizer",
            remedy="give the folder that 'gymtrl format' wrote",
        )
    return manifest


def read_dataset(dataset: Path, verb: str, sequences: tuple[Sequence, ...]) -> TrainingData:
    """Counts the tokens of a dataset folder and refuses what cannot be trained on.

    Args:
        dataset (`Path`): Folder with `manifest.json` and `data/{train,validation}-*.parquet`.
        verb (`str`): The verb that writes such datasets, such as `format dpo`, for messages.
        sequences (`tuple[Sequence, ...]`): What each row gives the model.

    Raises:
        UserError: No such folder, no training rows, a missing column, rows without loss, or labels that do not fit
            their ids.
    """
    manifest = dataset_manifest(dataset)
    found: Any = manifest.extra["fingerprint"]
    train = _split(dataset, "train", verb, sequences)
    if train is None:
        raise UserError(f"{dataset} holds no training rows", remedy=f"run 'gymtrl {verb}' again")
    return TrainingData(
        manifest=manifest,
        model=str(manifest.extra["model"]),
        fingerprint=Fingerprint(str(found["tokenizer"]), str(found["chat_template"])),
        train=train,
        validation=_split(dataset, "validation", verb, sequences),
    )


def load_rows(files: Iterable[Path], columns: Iterable[str], cache: Path) -> Dataset:
    """Loads columns of Parquet files, memory-mapped from files below `cache`."""
    from datasets import Dataset

    return Dataset.from_parquet(
        [str(path) for path in files], columns=list(columns), cache_dir=str(cache), split="train"
    )


@dataclass
class _Count:
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    masked: int = 0
    longest: int = 0
    longest_row: int = 0
    largest_id: int = 0


def _split(dataset: Path, name: str, verb: str, sequences: tuple[Sequence, ...]) -> Split | None:
    files = tuple(sorted((dataset / "data").glob(f"{name}-*.parquet")))
    again = f"run 'gymtrl {verb}' again"
    columns = sorted({column for sequence in sequences for column in sequence.columns})
    count = _Count()
    told = files[0].stem.rpartition("-of-")[2] if files else ""
    if told.isdecimal() and int(told) != len(files):
        raise UserError(f"{dataset} holds {len(files)} of its {int(told)} {name} files", remedy=again)
    for path in files:
        try:
            source = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path} cannot be read: {error}", remedy=again) from error
        if missing := [column for column in columns if column not in source.schema_arrow.names]:
            made_by = dataset_manifest(dataset).verb
            raise UserError(
                f"{path} has no column {missing[0]}",
                remedy=again if made_by == verb else f"it was made by '{made_by}'; make one with 'gymtrl {verb}'",
            )
        if "images" in source.schema_arrow.names:
            raise UserError(
                f"{dataset} holds images, which this training does not show the model",
                remedy=f"run 'python {dataset / 'train_with_trl.py'}'",
            )
        for batch in source.iter_batches(batch_size=1024, columns=columns):
            for sequence in sequences:
                if not _add(count, batch, sequence):
                    raise UserError(f"{path}: {sequence.loss} and {sequence.ids[-1]} differ in length", remedy=again)
            count.rows += len(batch)
    if not count.rows:
        return None
    if count.masked:
        raise UserError(
            f"{dataset}: {count.masked} of {count.rows} {name} rows have no token that carries loss: they teach "
            "nothing",
            remedy="labels must hold the token id where the policy's words stand; " + again,
        )
    return Split(files, count.rows, count.tokens, count.loss_tokens, count.longest, count.longest_row, count.largest_id)


def _add(count: _Count, batch: pa.RecordBatch, sequence: Sequence) -> bool:
    """Counts one sequence of each row; tells whether its loss column fits its ids."""
    loss = batch.column(sequence.loss)
    lists = [batch.column(column) for column in sequence.ids]
    lengths = [np.diff(ids.offsets.to_numpy()) for ids in lists]
    same = np.array_equal(lengths[-1], np.diff(loss.offsets.to_numpy()))
    if any(column.null_count for column in (*lists, loss)) or not same:
        return False
    labels = loss.flatten().to_numpy()
    carries = labels != IGNORED if sequence.loss == "labels" else labels != 0
    # With no other column before it, its first token has nothing that it could be predicted from.
    alone = len(lists) == 1 or lengths[0] == 0
    counted = _loss_tokens(carries, lengths[-1], alone)
    total = np.sum(lengths, axis=0)
    at = int(total.argmax()) if len(total) else 0
    if len(total) and int(total[at]) > count.longest:
        count.longest, count.longest_row = int(total[at]), count.rows + at
    count.tokens += int(total.sum())
    count.loss_tokens += int(counted.sum())
    count.masked += int((counted == 0).sum())
    count.largest_id = max([count.largest_id, *(int(ids.flatten().to_numpy().max(initial=0)) for ids in lists)])
    return True


def _loss_tokens(
    carries: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], alone: np.ndarray[Any, Any] | bool
) -> np.ndarray[Any, Any]:
    """Counts, for each row, the tokens that a model can be trained on."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.zeros(len(carries), dtype=bool)
    starts = np.cumsum(lengths) - lengths
    first[starts[(lengths > 0) & alone]] = True
    return np.bincount(owner[carries & ~first], minlength=len(lengths))
