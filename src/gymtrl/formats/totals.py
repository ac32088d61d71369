"""What a dataset folder holds in all, counted from its files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.formats.checks import IGNORED
from gymtrl.formats.painted import Objective, objective_of, split_files

SPLITS = ("train", "validation")

# For each objective: the columns of each sequence in order, then its mask; labels are a mask, too.
_SEQUENCES: dict[Objective, list[tuple[tuple[str, ...], str | None]]] = {
    "sft": [(("input_ids",), "labels")],
    "dpo": [(("prompt_ids", "chosen_ids"), "chosen_mask"), (("prompt_ids", "rejected_ids"), "rejected_mask")],
    "reward": [(("chosen_ids",), None), (("rejected_ids",), None)],
    "kto": [(("prompt_ids", "completion_ids"), "completion_mask")],
    "prompts": [(("prompt_ids",), None)],
    "groups": [(("prompt_ids", "completion_ids"), "completion_mask")],
}


@dataclass(frozen=True)
class Totals:
    """Counts over a dataset.

    Attributes:
        objective (`str`): As in `PaintedRow`.
        rows (`dict[str, int]`): By split.
        tokens (`int`): Of all rows; in a pair both sides count, each with its prompt.
        trained (`int`): Tokens that carry loss; 0 in reward and prompt datasets, which have no mask.
        longest (`int`): Tokens of the longest sequence.
        routes, flags (`dict[str, int]`): By frequency; routes count sequences, flags rows.
        dropped (`dict[str, int]`): Rows by the reason why they were not written, by frequency.
    """

    objective: Objective
    rows: dict[str, int]
    tokens: int
    trained: int
    longest: int
    routes: dict[str, int]
    flags: dict[str, int]
    dropped: dict[str, int]

    @property
    def share(self) -> float:
        """Part of the tokens that carries loss."""
        return self.trained / self.tokens if self.tokens else 0.0


def dataset_totals(dataset: Path) -> Totals:
    """Counts rows and tokens of a dataset folder.

    Args:
        dataset (`Path`): Dataset folder, of any objective.

    Raises:
        UserError: The folder holds no rows or no token ids.
    """
    files = [(split, file) for split in SPLITS for file in split_files(dataset, split)]
    if not files:
        raise UserError(f"{dataset} holds no rows", remedy="give the folder that 'gymtrl format' wrote")
    objective = objective_of(files[0][1])
    sequences = _SEQUENCES[objective]
    rows: Counter[str] = Counter()
    routes: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    tokens = trained = longest = 0
    for split, path in files:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            told = [name for name in ("route", "chosen_route", "rejected_route") if name in names]
            wanted = {name for ids, mask in sequences for name in (*ids, *([mask] if mask else []))}
            listed = ["flags"] if "flags" in names else []
            for batch in file.iter_batches(batch_size=256, columns=[*sorted(wanted), *told, *listed]):
                rows[split] += batch.num_rows
                for ids, mask in sequences:
                    lengths = _lengths(batch, ids)
                    tokens += pc.sum(lengths).as_py() or 0
                    longest = max(longest, pc.max(lengths).as_py() or 0)
                    if mask is not None:
                        flat = batch.column(mask).flatten()
                        carries = pc.not_equal(flat, IGNORED) if mask == "labels" else pc.equal(flat, 1)
                        trained += pc.sum(carries).as_py() or 0
                for name in told:
                    routes.update(_counted(batch.column(name)))
                for name in listed:
                    flags.update(_counted(batch.column(name).flatten()))
    return Totals(
        objective=objective,
        rows=dict(rows),
        tokens=tokens,
        trained=trained,
        longest=longest,
        routes=dict(routes.most_common()),
        flags=dict(flags.most_common()),
        dropped=_dropped(dataset / "dropped.parquet"),
    )


def _lengths(batch: pa.RecordBatch, columns: tuple[str, ...]) -> pa.Array:
    lengths = pc.list_value_length(batch.column(columns[0]))
    for name in columns[1:]:
        lengths = pc.add(lengths, pc.list_value_length(batch.column(name)))
    return lengths


def _dropped(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    reasons = pq.read_table(file, columns=["reason"]).column("reason").combine_chunks()
    return dict(_counted(reasons).most_common())


def _counted(values: pa.Array) -> Counter[str]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(values.drop_null()).to_pylist()})
