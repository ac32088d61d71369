"""Pieces of rollout files, each read into a table of its own, here or by processes that do nothing else.

Run as (by `scan_with_workers`): python -m gymtrl.rollouts.pieces
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from gymtrl.errors import RunError

from .reader import Range, read_range
from .record import Line
from .table import raw_table


class Piece(msgspec.Struct, frozen=True):
    """The lines that begin in a part of a file, and where their table goes.

    Attributes:
        path (`str`): The rollout file.
        start, stop (`int`): First byte, and the one after the last.
        cluster (`str`, *optional*), max_line_bytes (`int`): As in `read_lines`.
        table (`str`): Arrow file to write; its lines are numbered from 1.
    """

    path: str
    start: int
    stop: int
    cluster: str | None
    max_line_bytes: int
    table: str


class Scanned(msgspec.Struct, frozen=True):
    """What was found in a piece.

    Attributes:
        lines (`int`): All lines, blank ones included.
        rollouts (`int`): Rollouts among them.
        named (`int`): Rollouts that have the cluster, where one is named.
    """

    lines: int
    rollouts: int
    named: int


def scan_piece(piece: Piece) -> Scanned:
    """Reads a piece and writes its table."""
    count = 0

    def lines() -> Iterator[Line]:
        nonlocal count
        part = Range(Path(piece.path), piece.start, piece.stop)
        count = yield from read_range(part, cluster=piece.cluster, max_line_bytes=piece.max_line_bytes)

    table = raw_table(lines())
    table.write_ipc(piece.table)
    missing = int(table["flags"].list.contains("cluster_missing").sum())
    rollouts = table.height - table["task_key"].null_count()
    return Scanned(count, rollouts, rollouts - missing)


def scan_with_workers(pieces: Sequence[Piece], workers: int) -> Iterator[Scanned]:
    """Reads pieces with several processes.

    Args:
        pieces (`Sequence[Piece]`): Process k reads every `workers`-th of them, from the k-th on.
        workers (`int`): Processes. They end with the iteration, however it ends.

    Yields:
        `Scanned`: One a piece, in order.

    Raises:
        `RunError`: If a process ends before its work does.
    """
    command = [sys.executable, "-m", __name__]
    with ExitStack() as stack:
        running = []
        for first in range(min(workers, len(pieces))):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(_end, process)
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(pieces[first::workers]))
            process.stdin.close()
            running.append(process)
        for index in range(len(pieces)):
            stdout = running[index % workers].stdout
            assert stdout is not None
            answer = stdout.readline()
            if not answer:
                raise RunError(
                    f"a process that reads {pieces[index].path} has died",
                    remedy="its message stands above; if memory ran out, lower --max-line-bytes",
                )
            yield msgspec.json.decode(answer, type=Scanned)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _work() -> None:
    """Reads the pieces that standard input names; one line of standard output a piece."""
    for piece in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Piece]):
        sys.stdout.buffer.write(msgspec.json.encode(scan_piece(piece)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _work()
