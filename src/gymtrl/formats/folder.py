"""A dataset folder in the making: rows written or dropped with a reason, and what the manifest tells of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gymtrl.errors import UserError
from gymtrl.formats.card import write_card, write_script
from gymtrl.formats.checks import Refusal
from gymtrl.formats.dataset import DROPPED_SCHEMA, Objective, ParquetRows, schemas
from gymtrl.formats.reasons import CHOICE_DROPS, DROPS, NO_REMEDY, remedy_for
from gymtrl.formats.settings import FormatSettings
from gymtrl.formats.source import SPLITS, Identity, format_inputs
from gymtrl.formats.templates import ModelTemplate
from gymtrl.models.fingerprint import file_hashes, fingerprint
from gymtrl.workspace.artefact import Counts, artefact, sha256_of


@dataclass(frozen=True)
class FormatResult:
    """What a format verb wrote.

    Attributes:
        path (`Path`): The dataset folder.
        counts (`Counts`): Lines read, used and dropped by reason.
        rows (`dict[str, int]`): Rows by split.
        tokens, loss_tokens (`int`): Over all splits; the second counts the tokens that carry loss.
        longest (`int`): Tokens of the longest sequence.
        routes (`dict[str, int]`): Token sequences by the way they came about.
        flags (`dict[str, int]`): Rows by remark.
        facts (`dict[str, Any]`): What only this objective knows, such as the weights of KTO.
    """

    path: Path
    counts: Counts
    rows: dict[str, int]
    tokens: int
    loss_tokens: int
    longest: int
    routes: dict[str, int]
    flags: dict[str, int]
    facts: dict[str, Any]


@dataclass
class DatasetDraft:
    """Takes rows and drops of a dataset, and counts them.

    Attributes:
        facts (`dict[str, Any]`): What only this objective knows, for the manifest.
        result (`FormatResult`, *optional*): Set when the folder is whole.
    """

    _writers: Mapping[str, ParquetRows]
    _dropped: ParquetRows
    facts: dict[str, Any] = field(default_factory=dict)
    result: FormatResult | None = None
    _used: int = 0
    _reasons: Counter[str] = field(default_factory=Counter)
    _routes: Counter[str] = field(default_factory=Counter)
    _flags: Counter[str] = field(default_factory=Counter)
    _tokens: int = 0
    _loss_tokens: int = 0
    _longest: int = 0

    def write(
        self, split: str, row: dict[str, Any], *, routes: list[str], lengths: list[int], loss_tokens: int
    ) -> None:
        """Adds a row.

        Args:
            split (`str`): `train` or `validation`.
            row (`dict[str, Any]`): Column name → value.
            routes (`list[str]`): How each of its token sequences came about.
            lengths (`list[int]`): Tokens of each sequence.
            loss_tokens (`int`): How many of them carry loss.
        """
        self._writers[split].write(row)
        self._routes.update(routes)
        self._flags.update(row.get("flags", ()))
        self._tokens += sum(lengths)
        self._loss_tokens += loss_tokens
        self._longest = max(self._longest, *lengths)

    def use(self, lines: int = 1) -> None:
        """Counts lines that stand behind at least one row."""
        self._used += lines

    def drop(self, split: str, identity: Identity, refusal: Refusal) -> None:
        """Notes why a line stands behind no row."""
        self._reasons[refusal.reason] += 1
        where = {"row_id": identity.row_id, "file": identity.file, "line": identity.line, "split": split}
        self._dropped.write({**where, "reason": refusal.reason, "detail": refusal.detail})

    def close(self, path: Path) -> FormatResult:
        """What was written so far."""
        dropped = dict(sorted(self._reasons.items()))
        used = self._used
        return FormatResult(
            path=path,
            counts=Counts(read=used + sum(dropped.values()), written=used, dropped=dropped),
            rows={split: writer.rows for split, writer in self._writers.items()},
            tokens=self._tokens,
            loss_tokens=self._loss_tokens,
            longest=self._longest,
            routes=dict(self._routes),
            flags=dict(self._flags),
            facts=self.facts,
        )


@contextmanager
def dataset_folder(
    source: Path, out: Path, verb: str, objective: Objective, settings: FormatSettings, template: ModelTemplate
) -> Iterator[DatasetDraft]:
    """Opens a dataset folder; when the block ends, everything beside the rows is written and the folder is whole.

    Args:
        source (`Path`): What the dataset is made of.
        out (`Path`): The folder.
        verb (`str`): As on the command line, such as `format sft`.
        objective (`str`): Which columns there are.
        settings (`FormatSettings`): Of the verb.
        template (`ModelTemplate`): Of the model.

    Raises:
        UserError: No training row was written.
        RunError: The disk is full or not writable.
    """
    collected, stored = schemas(objective)
    with artefact(out, verb=verb, settings=settings, inputs=format_inputs(source, settings)) as draft:
        data = draft.path / "data"
        data.mkdir()
        with ExitStack() as stack:
            writers = {s: stack.enter_context(ParquetRows(data, s, collected, stored)) for s in SPLITS}
            dropped = stack.enter_context(ParquetRows(draft.path, "dropped", DROPPED_SCHEMA, numbered=False))
            made = DatasetDraft(writers, dropped)
            yield made
        result = made.close(out)
        if not result.rows["train"]:
            raise nothing_left(source, result, "training")
        draft.counts = result.counts
        write_script(draft.path, objective, settings, result.facts)
        files = [file for writer in writers.values() for file in writer.files]
        hashes = {str(path.relative_to(draft.path)): sha256_of(path) for path in files}
        write_card(draft.path, objective, settings, result, source_sha256=sha256_of(source), hashes=hashes.values())
        draft.extra.update(
            {
                "model": settings.model,
                "fingerprint": fingerprint(template.tokenizer).as_dict(),
                "tokenizer_files": file_hashes(settings.model),
                "objective": objective,
                "rows": result.rows,
                "tokens": result.tokens,
                "loss_tokens": result.loss_tokens,
                "longest": result.longest,
                "routes": result.routes,
                "flags": result.flags,
                **result.facts,
                "files": hashes,
            }
        )
    made.result = result


def nothing_left(source: Path, result: FormatResult, kind: str) -> UserError:
    """What is told where rows of a kind, such as `good` ones, are needed and all were dropped."""
    dropped = sorted(result.counts.dropped.items(), key=lambda item: (-item[1], item[0] in CHOICE_DROPS))
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped) or "the file is empty"
    # Copies and the like need no remedy; what else was in the way often has one.
    remedies = [DROPS[reason].remedy for reason, _ in dropped if reason in DROPS and DROPS[reason].remedy != NO_REMEDY]
    remedy = remedies[0] if remedies else remedy_for("")
    return UserError(
        f"{source}: no {kind} row is left of {result.counts.read} lines: {reasons}",
        remedy=remedy[0].lower() + remedy[1:].rstrip("."),
    )
