"""The rows of a dataset with the tokens that carry loss told from the others, and what can be checked about them.

All is read from the ids and masks that were written, decoded with the model's tokenizer: what is shown is what a
trainer gets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from gymtrl.errors import UserError
from gymtrl.formats.checks import IGNORED
from gymtrl.formats.painted_checks import Chat, Check, Decoder, check_lengths, check_prompt, check_side
from gymtrl.formats.templates import model_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Objective = Literal["sft", "dpo", "reward", "kto", "prompts", "groups"]

TOKENS_APART = 4000
"""Tokens of a side that are decoded one by one, so that a page stays small enough to open. Chosen by us."""

_TOKENS_OF_A_CHARACTER = 8
_KEY_SHOWN = 12


@dataclass(frozen=True)
class Piece:
    """The least number of tokens that decode to whole characters; behind `TOKENS_APART`, the rest of a segment.

    Attributes:
        text (`str`): What they decode to.
        ids (`tuple[int, ...]`): The tokens.
    """

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens that all carry loss or all carry none.

    Attributes:
        pieces (`tuple[Piece, ...]`): Its tokens in order.
        trained (`bool`): They carry loss; in a reward dataset, the score is read from them.
    """

    pieces: tuple[Piece, ...]
    trained: bool

    @property
    def text(self) -> str:
        """What the tokens decode to."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)


@dataclass(frozen=True)
class Side:
    """One token sequence of a row.

    Attributes:
        name (`str`): `chosen` or `rejected` in a pair, else `""`.
        facts (`tuple[tuple[str, str], ...]`): Names and values that belong to this side.
        segments (`tuple[Segment, ...]`): The whole sequence.
        tokens, trained (`int`): All tokens, and those that carry loss.
        checks (`tuple[Check, ...]`): What was found about them.
    """

    name: str
    facts: tuple[tuple[str, str], ...]
    segments: tuple[Segment, ...]
    tokens: int
    trained: int
    checks: tuple[Check, ...]

    @property
    def share(self) -> float:
        """Part of the tokens that carries loss."""
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class PaintedRow:
    """A row of a dataset, ready to be shown. Its texts are foreign: escape them.

    Attributes:
        objective (`str`): What the dataset is for, told from its columns: `sft`, `dpo`, `reward`, `kto`, `prompts`
            (GRPO that asks the model) or `groups` (GRPO on what was recorded).
        title (`str`): Where the row came from.
        facts (`tuple[tuple[str, str], ...]`): Names and values: task, reward, label and the like.
        flags (`tuple[str, ...]`): Remarks.
        sides (`tuple[Side, ...]`): One sequence, or two in a pair.
    """

    objective: Objective
    title: str
    facts: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    sides: tuple[Side, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for side in self.sides for check in side.checks)


def painted_rows(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, n: int, split: str = "train"
) -> Iterator[PaintedRow]:
    """Reads the first rows of a dataset and decodes them.

    Args:
        dataset (`Path`): Dataset folder, of any objective.
        tokenizer (`PreTrainedTokenizerBase`): Of the model that it was made for.
        n (`int`): Rows to read.
        split (`str`, *optional*, defaults to `"train"`): Or `validation`.

    Returns:
        `Iterator[PaintedRow]`: One at a time, in the order of the dataset. Raises `UserError` where a row holds ids
        that the tokenizer does not have.

    Raises:
        UserError: The folder holds no rows of that split or no token ids, or the tokenizer has no chat template.
    """
    files = split_files(dataset, split)
    if not files:
        raise UserError(f"{dataset} holds no {split} rows", remedy="give the folder that 'gymtrl format' wrote")
    objective = objective_of(files[0])
    return _painted(files, Decoder(model_template(tokenizer)), objective, n)


def split_files(dataset: Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order; none where it is empty."""
    return sorted((dataset / "data").glob(f"{split}-*.parquet"))


def objective_of(file: Path) -> Objective:
    """Tells from the columns of a Parquet file what the dataset is for.

    Raises:
        UserError: The file holds no token ids.
    """
    columns = set(pq.read_schema(file).names)
    if {"input_ids", "labels"} <= columns:
        return "sft"
    if {"chosen_ids", "rejected_ids"} <= columns:
        return "dpo" if "chosen_mask" in columns else "reward"
    if "completion_ids" in columns:
        return "kto" if "label" in columns else "groups"
    if "prompt_ids" in columns:
        return "prompts"
    raise UserError(f"{file} holds no token ids", remedy="give the folder that 'gymtrl format' wrote")


def _painted(files: Sequence[Path], decoder: Decoder, objective: Objective, n: int) -> Iterator[PaintedRow]:
    left = n
    for file in files:
        if left <= 0:
            return
        with pq.ParquetFile(file) as rows:
            # The view columns hold the record once more.
            columns = [name for name in rows.schema_arrow.names if name not in ("prompt", "completion", "tools")]
            columns = [name for name in columns if name not in ("chosen", "rejected")]
            for batch in rows.iter_batches(batch_size=max(1, min(left, 16)), columns=columns):
                for row in batch.to_pylist()[:left]:
                    yield _row(row, decoder, objective)
                    left -= 1
                if left <= 0:
                    return


def _row(row: Mapping[str, Any], decoder: Decoder, objective: Objective) -> PaintedRow:
    record = json.loads(row["record_json"])
    pair = objective in ("dpo", "reward")
    if pair:
        title = " over ".join(f"{row[f'{name}_file']}:{row[f'{name}_line']}" for name in ("chosen", "rejected"))
        sides = tuple(_side_of_pair(name, row, record, decoder) for name in ("chosen", "rejected"))
    else:
        title = f"{row['file']}:{row['line']}"
        sides = (_single(row, record, decoder, objective),)
    return PaintedRow(objective, title, _facts(row), tuple(row.get("flags") or ()), sides)


def _facts(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    reward, label, rate = row.get("reward"), row.get("label"), row.get("pass_rate")
    unrewarded = "none: a failed rollout" if "group" in row else "none"
    found = {
        "task": str(row["task_key"])[:_KEY_SHOWN],
        "group": str(row["group"])[:_KEY_SHOWN] if "group" in row else "",
        "reward": (unrewarded if reward is None else f"{reward:g}") if "reward" in row else "",
        "label": ("desirable" if label else "undesirable") if "label" in row else "",
        "pass rate": f"{rate:g} of {row['rollouts']} rollouts" if rate is not None else "",
        "part": f"{row['part']}" if row.get("part") else "",
        "kind": str(row.get("kind") or "").replace("_", " "),
        "messages shared": f"{row['depth']}" if "depth" in row else "",
        "route": row.get("route") or "",
    }
    return tuple((name, value) for name, value in found.items() if value)


def _single(row: Mapping[str, Any], record: Mapping[str, Chat], decoder: Decoder, objective: Objective) -> Side:
    if objective == "prompts":
        ids = row["prompt_ids"]
        return _side("", (), ids, [False] * len(ids), check_prompt(ids, record["prompt"], decoder), decoder)
    if objective == "sft":
        ids = row["input_ids"]
        trained = [label != IGNORED for label in row["labels"]]
        lengths = check_lengths(ids, row["labels"], labels=True)
    else:
        ids = row["prompt_ids"] + row["completion_ids"]
        trained = [False] * len(row["prompt_ids"]) + [entry == 1 for entry in row["completion_mask"]]
        lengths = check_lengths(row["completion_ids"], row["completion_mask"], log_probs=row.get("log_probs"))
    trained = _fitted(trained, len(ids))
    checks = check_side(ids, trained, record["prompt"], record["completion"], decoder)
    return _side("", (), ids, trained, (lengths, *checks), decoder)


def _side_of_pair(name: str, row: Mapping[str, Any], record: Mapping[str, Chat], decoder: Decoder) -> Side:
    reward, route = row.get(f"{name}_reward"), row.get(f"{name}_route")
    pairs = (("reward", "" if reward is None else f"{reward:g}"), ("route", route or ""))
    facts = tuple((key, value) for key, value in pairs if value)
    own, mask = row[f"{name}_ids"], row.get(f"{name}_mask")
    if mask is None:
        # A reward model reads its score from the last token.
        trained = [i == len(own) - 1 for i in range(len(own))]
        return _side(name, facts, own, trained, check_side(own, None, record["prompt"], record[name], decoder), decoder)
    ids = row["prompt_ids"] + own
    trained = _fitted([False] * len(row["prompt_ids"]) + [entry == 1 for entry in mask], len(ids))
    checks = (check_lengths(own, mask), *check_side(ids, trained, record["prompt"], record[name], decoder))
    return _side(name, facts, ids, trained, checks, decoder)


def _fitted(trained: list[bool], length: int) -> list[bool]:
    """A mask of another length than its ids is shown as far as it goes; a check tells of it."""
    return (trained + [False] * length)[:length]


def _side(
    name: str,
    facts: tuple[tuple[str, str], ...],
    ids: list[int],
    trained: list[bool],
    checks: tuple[Check, ...],
    decoder: Decoder,
) -> Side:
    pieces = _pieces(ids, trained, decoder)
    segments = tuple(
        Segment(tuple(piece for piece, _ in group), loss) for loss, group in groupby(pieces, key=lambda pair: pair[1])
    )
    return Side(name, facts, segments, len(ids), sum(trained), checks)


def _pieces(ids: list[int], trained: list[bool], decoder: Decoder) -> Iterator[tuple[Piece, bool]]:
    before = start = 0
    for end in range(1, len(ids) + 1):
        last = end == len(ids) or trained[end] != trained[start]
        if not last and start >= TOKENS_APART:
            continue
        # Behind the piece before it: some tokenizers drop the space at the head of what they decode.
        context, text = decoder.text(ids[before:start]), decoder.text(ids[before:end])
        # A character may need several tokens.
        if text.endswith("\ufffd") and not last and end - start < _TOKENS_OF_A_CHARACTER:
            continue
        own = text[len(context) :] if text.startswith(context) else decoder.text(ids[start:end])
        yield Piece(own, tuple(ids[start:end])), trained[start]
        before, start = start, end
