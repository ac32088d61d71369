"""Rollout files → the rollout table on disk, in one pass, by one process or several."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import polars as pl

from gymtrl.errors import UserError

from .inputs import expand_inputs
from .pieces import Piece, Scanned, scan_piece, scan_with_workers
from .reader import MAX_LINE_BYTES, cluster_is_nowhere
from .sidecars import inputs_beside
from .table import SCHEMA, false_groups, without_false_groups

PIECE_BYTES = 64_000_000
"""Bytes of a file that are read at a time; a table of them is small, and their reading takes a fraction of a second."""

ROWS_A_GROUP = 50_000
"""Rows of the table that are held in memory together while it is written."""

WORKER_BYTES = 200_000_000
"""From how many bytes on another process pays: it takes about half a second to start."""

MOST_WORKERS = 4
"""Each takes about 100 MB; who has the memory asks for more."""

_FACTS = "gymtrl"
_MAKE = "make it: gymtrl inspect ROLLOUTS --table TABLE.parquet"


class SourceFile(msgspec.Struct, frozen=True):
    """A file that a table was made from, as it was then."""

    path: str
    size: int
    modified_ns: int


class TableFacts(msgspec.Struct, frozen=True):
    """What a stored table says of itself.

    Attributes:
        files (`list[SourceFile]`): The rollout files, in order.
        sidecars (`list[SourceFile]`): The materialized inputs beside them.
        cluster (`str`, *optional*): Dotted path that gave the cluster keys.
    """

    files: list[SourceFile]
    sidecars: list[SourceFile]
    cluster: str | None


def write_table(
    inputs: Sequence[Path],
    out: Path,
    *,
    cluster: str | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    workers: int | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Reads rollout files and writes their table as Parquet; memory grows with the number of lines only.

    Args:
        inputs (`Sequence[Path]`): Rollout files, or folders that hold them.
        out (`Path`): The file to write; it appears whole or not at all.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.
        max_line_bytes (`int`, *optional*, defaults to 64 MB): Longer lines are refused unread.
        workers (`int`, *optional*): Processes that read; by default one for small files, else one a core.
        on_bytes (`Callable[[int], object]`, *optional*): Called with the number of bytes read since the last call.

    Raises:
        `UserError`: If a file is missing, or there are rollouts and none of them has `cluster`.
        `RunError`: If a process that reads has died.
    """
    files = expand_inputs(inputs)
    facts = TableFacts([_state(path) for path in files], _sidecars(files), cluster)
    count = _default_workers(facts) if workers is None else workers
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        pieces = list(_pieces(facts, Path(folder), max_line_bytes))
        parts: list[pl.LazyFrame] = []
        before = dict.fromkeys((file.path for file in facts.files), 0)
        rollouts = named = 0
        with closing(_scan(pieces, count)) as scanned:
            for piece, part in zip(pieces, scanned, strict=True):
                parts += [_part(table, before[piece.path]) for table in part.tables]
                before[piece.path] += part.lines
                rollouts += part.rollouts
                named += part.named
                if on_bytes is not None:
                    on_bytes(piece.stop - piece.start)
        if cluster is not None and rollouts and not named:
            raise cluster_is_nowhere(cluster, rollouts)
        table = pl.concat(parts, how="diagonal") if parts else pl.LazyFrame(schema=SCHEMA)
        names = table.collect_schema().names()
        table = without_false_groups(table, false_groups(table))
        draft = Path(folder) / "table.parquet"
        table.select(*SCHEMA, *sorted(names[len(SCHEMA) :])).sink_parquet(
            draft,
            compression_level=1,
            row_group_size=ROWS_A_GROUP,
            metadata={_FACTS: msgspec.json.encode(facts).decode()},
        )
        draft.replace(out)


def table_for(
    inputs: Sequence[Path],
    folder: Path,
    *,
    cluster: str | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
    workers: int | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Path:
    """The table of the inputs: one that exists already, where a single `.parquet` is named, else a new one in `folder`.

    Args:
        inputs (`Sequence[Path]`): One table made before, or rollout files and folders.
        folder (`Path`): Where a new table is written.
        cluster, max_line_bytes, workers, on_bytes: As in `write_table`.

    Returns:
        `Path`: A Parquet file with the columns of `table.SCHEMA`.

    Raises:
        `UserError`: If the table is none, or was made of files that have changed since, or by another cluster.
    """
    tables = [path for path in inputs if path.suffix == ".parquet"]
    if tables and len(inputs) > 1:
        raise UserError(
            f"{tables[0]} is a table and stands alone: it names its rollout files itself",
            remedy="name one table, or the rollout files; gymtrl inspect FILES --table makes one table of many files",
        )
    if tables:
        _check(tables[0], read_facts(tables[0]), cluster)
        return tables[0]
    path = folder / "table.parquet"
    write_table(inputs, path, cluster=cluster, max_line_bytes=max_line_bytes, workers=workers, on_bytes=on_bytes)
    return path


def read_facts(table: Path) -> TableFacts | None:
    """What a stored table says of itself; `None` where it says nothing, as one that was changed by other programs.

    Raises:
        `UserError`: If the file is missing or no Parquet file.
    """
    try:
        told = pl.read_parquet_metadata(table).get(_FACTS)
        schema = pl.scan_parquet(table, glob=False).collect_schema()
    except FileNotFoundError:
        raise UserError(f"{table} does not exist", remedy=_MAKE) from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{table} is no Parquet file: {str(error).partition(chr(10))[0]}", remedy=_MAKE) from None
    wrong = [name for name, kind in SCHEMA.items() if schema.get(name) != kind]
    if wrong:
        raise UserError(f"{table} is no rollout table of this version: {', '.join(wrong)}", remedy=_MAKE)
    try:
        return None if told is None else msgspec.json.decode(told, type=TableFacts)
    except msgspec.MsgspecError:
        return None


def _check(table: Path, facts: TableFacts | None, cluster: str | None) -> None:
    if facts is None:
        if cluster is not None:
            raise UserError(
                f"{table} does not say what its clusters are: {cluster!r} cannot be looked up in it",
                remedy="name the rollout files instead, or give the clusters as a .jsonl file",
            )
        return
    again = _sidecars([Path(file.path) for file in facts.files])
    remake = f"make the table again: gymtrl inspect ROLLOUTS --table {table}"
    for file in facts.files:
        if not Path(file.path).is_file():
            raise UserError(
                f"{file.path}, which {table} was made from, is gone",
                remedy=f"put it back, go to the folder where the table was made, or {remake}",
            )
        if _state(Path(file.path)) != file:
            raise UserError(f"{file.path} has changed since {table} was made", remedy=remake)
    if again != facts.sidecars:
        raise UserError(f"the materialized inputs beside the files have changed since {table} was made", remedy=remake)
    if cluster is not None and cluster != facts.cluster:
        raise UserError(
            f"{table} was made with {f'the cluster {facts.cluster!r}' if facts.cluster else 'no cluster'}",
            remedy=f"{remake} --cluster {cluster}",
        )


def _sidecars(files: Sequence[Path]) -> list[SourceFile]:
    return [_state(path) for path in map(inputs_beside, files) if path is not None]


def _state(path: Path) -> SourceFile:
    state = path.stat()
    return SourceFile(str(path), state.st_size, state.st_mtime_ns)


def _default_workers(facts: TableFacts) -> int:
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS, sum(file.size for file in facts.files) // WORKER_BYTES + 1)


def _pieces(facts: TableFacts, folder: Path, max_line_bytes: int) -> Iterator[Piece]:
    count = 0
    for file in facts.files:
        for start in range(0, file.size, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, file.size)
            yield Piece(file.path, start, stop, facts.cluster, max_line_bytes, str(folder / f"{count}"))
            count += 1


def _scan(pieces: Sequence[Piece], workers: int) -> Generator[Scanned]:
    yield from map(scan_piece, pieces) if workers <= 1 else scan_with_workers(pieces, workers)


def _part(table: str, lines_before: int) -> pl.LazyFrame:
    part = pl.scan_ipc(table, glob=False)
    return part.with_columns(pl.col("line") + lines_before) if lines_before else part
