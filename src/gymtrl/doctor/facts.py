"""What the rules need to know of a dataset folder, counted from its Parquet files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gymtrl.doctor.run import DataFacts

IGNORED = -100
SAME_REWARD = 1e-9
"""What summing the parts of a reward in another order can change."""

_IDS = ("prompt_ids", "input_ids", "completion_ids", "chosen_ids", "rejected_ids")
_MASKS = ("labels", "completion_mask", "chosen_mask", "rejected_mask")
_WEIGHTS = ("desirable_weight", "undesirable_weight")
_OTHERS = ("task_key", "label", "group", "reward")

Numbers = np.ndarray[Any, Any]


def data_facts(dataset: Path) -> DataFacts:
    """Counts the training rows of a dataset folder that `gymtrl format` wrote, for SFT, DPO, KTO or recorded groups.

    Args:
        dataset (`Path`): Folder with `manifest.json` and `data/train-*.parquet`.
    """
    count = _Count()
    for path in sorted((dataset / "data").glob("train-*.parquet")):
        source = pq.ParquetFile(path)
        columns = [name for name in (*_IDS, *_MASKS, *_OTHERS) if name in source.schema_arrow.names]
        for batch in source.iter_batches(batch_size=1024, columns=columns):
            count.add(batch)
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    extra = manifest.get("extra") or {}
    weights: dict[str, Any] = {
        name: float(extra[name]) for name in ("desirable_weight", "undesirable_weight") if name in extra
    }
    read, dropped = _lines(manifest)
    return replace(count.facts(), read=read, dropped=dropped, **weights)


def _lines(manifest: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Lines that were read and those that were dropped by reason, by the filter as well where it is still there."""
    counts = manifest.get("counts") or {}
    read, dropped = int(counts.get("read", 0)), Counter(counts.get("dropped", {}))
    # The other formats go through all lines of a filter folder, and count those that it dropped themselves.
    if manifest.get("verb") != "format sft":
        return read, dict(dropped)
    source = Path(manifest["inputs"][0]["path"]) / "manifest.json"
    if source.is_file():
        filtered = json.loads(source.read_text(encoding="utf-8")).get("counts") or {}
        read = int(filtered.get("read", read))
        dropped.update(filtered.get("dropped", {}))
    return read, dict(dropped)


class _Count:
    """Takes rows batch by batch."""

    def __init__(self) -> None:
        self._rows = self._tokens = self._loss = self._longest = self._copies = self._identical = self._longer = 0
        self._seen: set[bytes] = set()
        self._tasks: set[str] = set()
        self._good: list[int] = []
        self._bad: list[int] = []
        self._groups: dict[str, list[tuple[float, int]]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        names = set(batch.schema.names)
        rows = {name: list(_lists(batch.column(name))) for name in (*_IDS, *_MASKS) if name in names}
        others: dict[str, list[Any]] = {n: batch.column(n).to_pylist() for n in _OTHERS if n in names}
        self._tasks.update(task for task in others.get("task_key", ()) if task is not None)
        for at in range(len(batch)):
            row = {name: values[at] for name, values in rows.items()}
            length = self._add_row(row, others["label"][at] if "label" in others else None)
            if "group" in others:
                members, reward = self._groups.setdefault(others["group"][at], []), others["reward"][at]
                members += [] if reward is None else [(reward, length)]

    def _add_row(self, row: dict[str, Numbers], label: bool | None) -> int:
        """Counts a row; returns how many of its tokens carry loss."""
        self._rows += 1
        prompt = len(row.get("prompt_ids", ()))
        lengths = [prompt + len(row[name]) for name in _IDS[1:] if name in row]
        self._tokens += sum(lengths)
        self._longest = max(self._longest, *lengths)
        loss = {name: _loss(name, row[name]) for name in _MASKS if name in row}
        self._loss += sum(loss.values())
        key = b"".join(row[name].tobytes() + name.encode() for name in _IDS if name in row) + str(label).encode()
        digest = blake2b(key, digest_size=12).digest()
        self._copies += digest in self._seen
        self._seen.add(digest)
        if "chosen_ids" in row:
            self._identical += np.array_equal(row["chosen_ids"], row["rejected_ids"])
            self._good.append(loss["chosen_mask"])
            self._bad.append(loss["rejected_mask"])
            self._longer += loss["chosen_mask"] > loss["rejected_mask"]
        elif label is not None:
            (self._good if label else self._bad).append(loss["completion_mask"])
        return sum(loss.values())

    def facts(self) -> DataFacts:
        pairs = self._rows if len(self._good) == len(self._bad) == self._rows else 0
        differing = [members for members in self._groups.values() if _differ(members)]
        for members in differing:
            mean = fmean(reward for reward, _ in members)
            good, bad = ([n for reward, n in members if (reward > mean) is side] for side in (True, False))
            self._longer += fmean(good) > fmean(bad)
            self._good += good
            self._bad += bad
        unpaired = not pairs and not self._groups
        return DataFacts(
            rows=self._rows,
            tokens=self._tokens,
            loss_tokens=self._loss,
            longest=self._longest,
            duplicates=self._copies,
            tasks=len(self._tasks),
            identical_pairs=int(self._identical),
            good=len(self._good) if unpaired else 0,
            bad=len(self._bad) if unpaired else 0,
            good_length=float(median(self._good)) if self._good else 0.0,
            bad_length=float(median(self._bad)) if self._bad else 0.0,
            longer_share=self._longer / (pairs or len(differing) or 1),
            groups=len(self._groups),
            groups_alike=len(self._groups) - len(differing),
        )


def _differ(members: list[tuple[float, int]]) -> bool:
    rewards = [reward for reward, _ in members]
    return bool(rewards) and max(rewards) - min(rewards) > SAME_REWARD


def _lists(column: pa.ListArray) -> Iterator[Numbers]:
    """The lists of a column, one a row; a missing one is empty."""
    values, offsets = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    for start, end in pairwise(offsets):
        yield values[start:end]


def _loss(name: str, marks: Numbers) -> int:
    """Tokens that carry loss; the first of a whole sequence has nothing before it to be predicted from."""
    return int((marks[1:] != IGNORED).sum()) if name == "labels" else int((marks != 0).sum())
