"""The lines that table rows stand for, read again by their place and checked against their row id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gymtrl.errors import UserError
from gymtrl.rollouts.convert import judge
from gymtrl.rollouts.reader import read_bytes
from gymtrl.rollouts.record import Origin, Rollout
from gymtrl.rollouts.sidecars import Sidecar

PLACE = ("file", "line", "offset", "length", "row_id")
"""Columns of the table that say where a line stands."""

_SPAN = 4 << 20  # bytes that are read at once


class Placed(NamedTuple):
    """A line and the file that it is copied to."""

    file: str
    line: int
    offset: int
    length: int
    row_id: str
    split: str


def copy_lines(lines: Iterable[Placed], targets: Mapping[str, BinaryIO]) -> None:
    """Copies lines, each with one line break behind it, in the order given.

    Args:
        lines (`Iterable[Placed]`): The lines; neighbours in a file are read together.
        targets (`Mapping[str, BinaryIO]`): Where the lines of each split go.

    Raises:
        `UserError`: If a file is gone, or a line is not the one that the table was made from.
    """
    stream: BinaryIO | None = None
    name = None
    try:
        for run in _runs(lines):
            if stream is None or run[0].file != name:
                if stream is not None:
                    stream.close()
                name = run[0].file
                stream = _open(name)
            if run[0].length > _SPAN:
                _copy_long(stream, run[0], targets[run[0].split])
            else:
                _copy_run(stream, run, targets)
    finally:
        if stream is not None:
            stream.close()


def read_rollout(origin: Origin) -> Rollout:
    """Reads a rollout for its messages; its keys are those of the table.

    Raises:
        `UserError`: If the file is gone, or the line is no longer the rollout that the table was made from.
    """
    line = judge(read_bytes(origin), origin, Sidecar(None, {}), None)
    if line.rollout is None:
        raise _changed(f"{origin}")
    return line.rollout


def _runs(lines: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Neighbours in one file that fit into one read, gaps such as blank lines included."""
    run: list[Placed] = []
    for line in lines:
        if line.offset < 0 or line.length < 0:
            raise _changed(f"{line.file}:{line.line}")
        if run and not (
            line.file == run[0].file
            and line.offset >= run[-1].offset + run[-1].length
            and line.offset + line.length - run[0].offset <= _SPAN
        ):
            yield run
            run = []
        run.append(line)
    if run:
        yield run


def _copy_run(stream: BinaryIO, run: list[Placed], targets: Mapping[str, BinaryIO]) -> None:
    start = run[0].offset
    stream.seek(start)
    data = memoryview(stream.read(run[-1].offset + run[-1].length - start))
    for line in run:
        part = data[line.offset - start : line.offset - start + line.length]
        if hashlib.sha256(part).hexdigest()[:16] != line.row_id:
            raise _changed(f"{line.file}:{line.line}")
        targets[line.split].write(part)
        targets[line.split].write(b"\n")


def _copy_long(stream: BinaryIO, line: Placed, target: BinaryIO) -> None:
    stream.seek(line.offset)
    digest, left = hashlib.sha256(), line.length
    while left and (part := stream.read(min(left, _SPAN))):
        digest.update(part)
        target.write(part)
        left -= len(part)
    if digest.hexdigest()[:16] != line.row_id:
        raise _changed(f"{line.file}:{line.line}")
    target.write(b"\n")


def _open(name: str) -> BinaryIO:
    try:
        return Path(name).open("rb")
    except FileNotFoundError:
        raise UserError(
            f"{name} is gone", remedy="put it back, or name the rollout files; a table holds places in them only"
        ) from None


def _changed(where: str) -> UserError:
    return UserError(
        f"{where} is not the line that the table was made from",
        remedy="the file has changed since: make the table again with gymtrl inspect ROLLOUTS --table TABLE.parquet",
    )
