"""Rollout files, line by line: a verdict for each, and the way back to any of them by its place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from gymtrl.errors import UserError

from .convert import judge
from .inputs import expand_inputs
from .record import Line, Origin
from .sidecars import Sidecar, load_sidecar

__all__ = ["MAX_LINE_BYTES", "expand_inputs", "read_at", "read_bytes", "read_lines"]

MAX_LINE_BYTES = 64_000_000
_CHUNK = 1 << 20


def read_lines(
    inputs: Sequence[Path], *, cluster: str | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Line]:
    """Reads rollout files; memory does not grow with their size.

    Args:
        inputs (`Sequence[Path]`): JSONL files, or folders with rollout files in them.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart (`metadata.template`), looked up in
            the row, then in its input row.
        max_line_bytes (`int`, *optional*, defaults to 64 MB): Longer lines are refused unread.

    Yields:
        `Line`: One for each line that is not blank, in the order of files and lines.

    Raises:
        `UserError`: If a file is missing, or, at the end, if there are rollouts and none of them has `cluster`.
    """
    rollouts = named = 0
    for path in expand_inputs(inputs):
        sidecar = load_sidecar(path, cluster)
        with path.open("rb") as stream:
            for origin, data in _raw_lines(stream, str(path), max_line_bytes):
                line = _judge(origin, data, sidecar, cluster)
                if line.rollout is not None:
                    rollouts += 1
                    named += "cluster_missing" not in line.rollout.flags
                yield line
    if cluster is not None and rollouts and not named:
        raise UserError(
            f"none of the {rollouts} rollouts, nor any of their input rows, has {cluster!r}",
            remedy="give the dotted path of a key that the rows have, such as verifier_metadata.template",
        )


def read_bytes(origin: Origin) -> bytes:
    """The bytes of a line that was read before, without its line break.

    Raises:
        `UserError`: If the file is gone, or has changed since.
    """
    try:
        with Path(origin.file).open("rb") as stream:
            stream.seek(origin.offset)
            data = stream.read(origin.length)
    except FileNotFoundError:
        raise UserError(f"{origin.file} is gone", remedy="put it back, or run the stages again") from None
    if _row_id(data) != origin.row_id:
        raise UserError(f"{origin} has changed since it was read", remedy="run the stages again from the start")
    return data


def read_at(origin: Origin, *, cluster: str | None = None) -> Line:
    """Reads one line again by its place, with the same verdict and keys as the first time.

    Args:
        origin (`Origin`): Its place.
        cluster (`str`, *optional*): As in `read_lines`.

    Raises:
        `UserError`: If the file is gone, or has changed since.
    """
    return _judge(origin, read_bytes(origin), load_sidecar(Path(origin.file), cluster), cluster)


def _judge(origin: Origin, data: bytes | None, sidecar: Sidecar, cluster: str | None) -> Line:
    if data is None:
        return Line(origin, "reject", "line_too_long", f"{origin.length} bytes in one line")
    return judge(data, origin, sidecar, cluster)


def _raw_lines(stream: BinaryIO, file: str, limit: int) -> Iterator[tuple[Origin, bytes | None]]:
    """Lines that are not blank with their places; instead of one above the limit, `None`."""
    offset = number = 0
    while raw := stream.readline(limit + 2):
        number += 1
        start, offset = offset, offset + len(raw)
        data = raw.rstrip(b"\r\n")
        if len(data) > limit:
            size, length, row_id = _skip(stream, raw)
            offset = start + size
            yield Origin(file, number, start, length, row_id), None
        elif data and not data.isspace():
            yield Origin(file, number, start, len(data), _row_id(data)), data


def _skip(stream: BinaryIO, raw: bytes) -> tuple[int, int, str]:
    """Passes over the rest of a line: its bytes with and without the line break, and its row id."""
    digest = hashlib.sha256()
    size = length = 0
    held = b""  # line break characters that may turn out to stand inside the line
    while raw:
        size += len(raw)
        held += raw
        kept = held.rstrip(b"\r\n")
        digest.update(kept)
        length += len(kept)
        held = held[len(kept) :]
        if raw.endswith(b"\n"):
            break
        raw = stream.readline(_CHUNK)
    return size, length, digest.hexdigest()[:16]


def _row_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
