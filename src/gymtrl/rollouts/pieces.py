"""Pieces of rollout files, each read into a table of its own, here or by processes that do nothing else.

Run as (by `scan_with_workers`): python -m gymtrl.rollouts.pieces
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import msgspec

from gymtrl.errors import RunError, UserError

from .reader import Range, read_range
from .record import Line
from .table import raw_table

LINES_A_TABLE = 10_000
"""Rows that are held in memory together; of short lines a piece has millions."""


class Piece(msgspec.Struct, frozen=True):
    """The lines that begin in a part of a file, and where their tables go.

    Attributes:
        path (`str`): The rollout file.
        start, stop (`int`): First byte, and the one after the last.
        cluster (`str`, *optional*), max_line_bytes (`int`): As in `read_lines`.
        tables (`str`): The Arrow files to write are named after it; lines are numbered from 1.
    """

    path: str
    start: int
    stop: int
    cluster: str | None
    max_line_bytes: int
    tables: str


class Scanned(msgspec.Struct, frozen=True, tag=True):
    """What was found in a piece.

    Attributes:
        tables (`list[str]`): The Arrow files, in order; together they are the piece's table.
        lines (`int`): All lines, blank ones included.
        rollouts (`int`): Rollouts among them.
        named (`int`): Rollouts that have the cluster, where one is named.
    """

    tables: list[str]
    lines: int
    rollouts: int
    named: int


class _Failed(msgspec.Struct, frozen=True, tag=True):
    """What a process met that the user can mend."""

    message: str
    remedy: str | None


def scan_piece(piece: Piece) -> Scanned:
    """Reads a piece and writes its tables."""
    count = rollouts = named = 0

    def lines() -> Iterator[Line]:
        nonlocal count
        part = Range(Path(piece.path), piece.start, piece.stop)
        count = yield from read_range(part, cluster=piece.cluster, max_line_bytes=piece.max_line_bytes)

    tables: list[str] = []
    reading = lines()
    full = True
    while full:
        with _collector_paused():
            table = raw_table(islice(reading, LINES_A_TABLE))  # not a list: chats are forgotten one by one
        full = table.height == LINES_A_TABLE
        tables.append(f"{piece.tables}-{len(tables)}.arrow")
        table.write_ipc(tables[-1])
        found = table.height - table["task_key"].null_count()
        rollouts += found
        named += found - int(table["flags"].list.contains("cluster_missing").sum())
    return Scanned(tables, count, rollouts, named)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Rows refer to nothing in circles; to look for circles among them takes a fortieth of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def scan_with_workers(pieces: Sequence[Piece], workers: int) -> Iterator[Scanned]:
    """Reads pieces with several processes.

    Args:
        pieces (`Sequence[Piece]`): Process k reads every `workers`-th of them, from the k-th on.
        workers (`int`): Processes. They end with the iteration, however it ends.

    Yields:
        `Scanned`: One a piece, in order.

    Raises:
        `UserError`: If a file cannot be read.
        `RunError`: If a process ends before its work does.
    """
    # Not the user's folder on the path: files of any name may lie there.
    command = [sys.executable, "-P", "-m", __name__]
    with ExitStack() as stack:
        running = []
        for first in range(min(workers, len(pieces))):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            stack.callback(_end, process)
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has died, as will be seen when it is asked
                process.stdin.write(msgspec.json.encode(pieces[first::workers]))
                process.stdin.close()
            running.append(process)
        for index, piece in enumerate(pieces):
            stdout = running[index % workers].stdout
            assert stdout is not None
            answer = stdout.readline()
            if not answer:
                raise RunError(
                    f"the process that reads {piece.path} has died",
                    remedy="see whether memory ran out; fewer workers and a lower --max-line-bytes take less",
                )
            told = msgspec.json.decode(answer, type=Scanned | _Failed)
            if isinstance(told, _Failed):
                raise UserError(told.message, remedy=told.remedy)
            yield told


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def _work() -> None:
    """Reads the pieces that standard input names; one line of standard output a piece."""
    for piece in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Piece]):
        try:
            told: Scanned | _Failed = scan_piece(piece)
        except UserError as error:
            told = _Failed(error.message, error.remedy)
        sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _work()
