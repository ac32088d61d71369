"""What training needs to know about a dataset folder before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import Fingerprint
from gymtrl.workspace.artefact import Manifest, read_manifest

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
TOKEN_COLUMNS = ["input_ids", "labels"]
_AGAIN = "run 'gymtrl format sft' again"


@dataclass(frozen=True)
class Split:
    """The tokens of one split, counted.

    Attributes:
        files (`tuple[Path, ...]`): Its Parquet files, in order.
        rows (`int`): Rows.
        tokens (`int`): Tokens.
        loss_tokens (`int`): Tokens that carry loss and have one before them to be predicted from.
        longest (`int`): Tokens of the longest row.
        largest_id (`int`): The largest token id.
    """

    files: tuple[Path, ...]
    rows: int
    tokens: int
    loss_tokens: int
    longest: int
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
        UserError: No such folder, or it is no dataset for SFT.
    """
    manifest = read_manifest(dataset)
    if not isinstance(manifest.extra.get("fingerprint"), dict) or "model" not in manifest.extra:
        raise UserError(
            f"{dataset} is no dataset for SFT: its manifest names no tokenizer",
            remedy="give the folder that 'gymtrl format sft' wrote",
        )
    return manifest


def read_dataset(dataset: Path) -> TrainingData:
    """Counts the tokens of a dataset folder and refuses what cannot be trained on.

    Args:
        dataset (`Path`): Folder with `manifest.json` and `data/{train,validation}-*.parquet`.

    Raises:
        UserError: No such folder, no training rows, rows without loss, or labels that do not fit their ids.
    """
    manifest = dataset_manifest(dataset)
    found: Any = manifest.extra["fingerprint"]
    train = _split(dataset, "train")
    if train is None:
        raise UserError(f"{dataset} holds no training rows", remedy=_AGAIN)
    return TrainingData(
        manifest=manifest,
        model=str(manifest.extra["model"]),
        fingerprint=Fingerprint(str(found["tokenizer"]), str(found["chat_template"])),
        train=train,
        validation=_split(dataset, "validation"),
    )


def load_split(split: Split, cache: Path) -> Dataset:
    """Loads the tokens of a split, memory-mapped from files below `cache`."""
    from datasets import Dataset

    return Dataset.from_parquet(
        [str(path) for path in split.files], columns=TOKEN_COLUMNS, cache_dir=str(cache), split="train"
    )


def _split(dataset: Path, name: str) -> Split | None:
    files = tuple(sorted((dataset / "data").glob(f"{name}-*.parquet")))
    rows = tokens = loss_tokens = masked = longest = largest = 0
    for path in files:
        source = pq.ParquetFile(path)
        missing = [column for column in TOKEN_COLUMNS if column not in source.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]}", remedy=_AGAIN)
        if "images" in source.schema_arrow.names:
            raise UserError(
                f"{dataset} holds images, which this training does not show the model",
                remedy=f"run 'python {dataset / 'train_with_trl.py'}'",
            )
        for batch in source.iter_batches(batch_size=1024, columns=TOKEN_COLUMNS):
            ids, labels = batch.column("input_ids"), batch.column("labels")
            lengths = np.diff(ids.offsets.to_numpy())
            same = np.array_equal(lengths, np.diff(labels.offsets.to_numpy()))
            if ids.null_count or labels.null_count or not same:
                raise UserError(f"{path}: labels and input_ids differ in length", remedy=_AGAIN)
            loss = _loss_tokens(labels.flatten().to_numpy(), lengths)
            rows += len(lengths)
            tokens += int(lengths.sum())
            loss_tokens += int(loss.sum())
            masked += int((loss == 0).sum())
            longest = max(longest, int(lengths.max(initial=0)))
            largest = max(largest, int(ids.flatten().to_numpy().max(initial=0)))
    if not rows:
        return None
    if masked:
        raise UserError(
            f"{dataset}: {masked} of {rows} {name} rows have no token that carries loss: they teach nothing",
            remedy="labels must hold the token id where the policy's words stand; " + _AGAIN,
        )
    return Split(files, rows, tokens, loss_tokens, longest, largest)


def _loss_tokens(labels: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Counts, for each row, the labels that a model can be trained on: the first token has nothing before it."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.zeros(len(labels), dtype=bool)
    starts = np.cumsum(lengths) - lengths
    first[starts[lengths > 0]] = True
    return np.bincount(owner[(labels != IGNORED) & ~first], minlength=len(lengths))
