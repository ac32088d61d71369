"""What a choice of rollouts leaves out, told line by line like everything else that is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import polars as pl

from gymtrl.formats.checks import Refusal, Tokenized
from gymtrl.formats.folder import DatasetDraft
from gymtrl.formats.reasons import words_for
from gymtrl.formats.source import Identity
from gymtrl.selection.pool import Candidate, Pool, open_pool

Choice = TypeVar("Choice")
Item = TypeVar("Item")


def chosen_from(source: Path, reward_threshold: float | None, choose: Callable[[Pool], Choice]) -> tuple[Pool, Choice]:
    """Opens a source and chooses from it.

    Raises:
        UserError: As `open_pool` and the choice do.
    """
    with TemporaryDirectory(prefix="gymtrl-") as work:
        pool = open_pool(source, Path(work), reward_threshold=reward_threshold)
        return pool, choose(pool)


class Account:
    """Sees to it that every line of the source is used or dropped, and counted once.

    Args:
        draft (`DatasetDraft`): Takes the drops.
        unused (`pl.DataFrame`): Lines that were not chosen, as `Pool.unused` gives them; those that are used or refused
            all the same do not count.
    """

    def __init__(self, draft: DatasetDraft, unused: pl.DataFrame) -> None:
        self._draft = draft
        self._unused = unused
        self._used: set[tuple[str, int]] = set()
        self._refused: dict[tuple[str, int], tuple[Candidate, Refusal]] = {}

    def use(self, candidate: Candidate) -> None:
        """Notes that a line stands behind a row."""
        self._used.add((candidate.file, candidate.line))

    def refuse(self, candidate: Candidate, refusal: Refusal) -> None:
        """Notes that no row could be made of a line; another that it is in may still be."""
        self._refused.setdefault((candidate.file, candidate.line), (candidate, refusal))

    def close(self) -> None:
        """Drops the lines that stand behind no row."""
        self._draft.use(len(self._used))
        for row_id, file, line, split, reason in self._unused.iter_rows():
            if (file, line) not in self._used and (file, line) not in self._refused:
                identity = Identity(row_id, file, line, None, None, None)
                self._draft.drop(split, identity, Refusal(reason, words_for(reason)))
        for place, (candidate, refusal) in self._refused.items():
            if place not in self._used:
                self._draft.drop(candidate.side, identity_of(candidate), refusal)


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def fitting(tokens: Tokenized | Refusal, limit: int | None) -> Tokenized | Refusal:
    """The tokens, or why they cannot be used where there are more than `limit`."""
    if isinstance(tokens, Tokenized) and limit is not None and len(tokens.input_ids) > limit:
        return Refusal("too_long", f"{len(tokens.input_ids)} tokens, {limit} fit")
    return tokens


def identity_of(candidate: Candidate) -> Identity:
    """What a row says of the rollout that it came from."""
    return Identity(
        candidate.row_id,
        candidate.file,
        candidate.line,
        candidate.task_key,
        candidate.input_key,
        candidate.cluster_key,
    )
