"""Rollout files, line by line: a verdict for each, and the way back to any of them by its place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gymtrl.errors import UserError

from .convert import asked_only, judge
from .inputs import expand_inputs
from .record import Line, Origin, Rollout
from .sidecars import load_sidecar

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
        for line in read_range(Range(path), cluster=cluster, max_line_bytes=max_line_bytes):
            if line.rollout is not None:
                rollouts += 1
                named += "cluster_missing" not in line.rollout.flags
            yield line
    if cluster is not None and rollouts and not named:
        raise cluster_is_nowhere(cluster, rollouts)


class Range(NamedTuple):
    """A part of a file: the lines that begin in it.

    Attributes:
        path (`Path`): The file.
        start, stop (`int`): First byte, and the one after the last; `stop` is `None` for the file's end.
    """

    path: Path
    start: int = 0
    stop: int | None = None


def read_range(
    part: Range, *, cluster: str | None = None, max_line_bytes: int = MAX_LINE_BYTES
) -> Generator[Line, None, int]:
    """Reads the lines that begin in a part of a file.

    Args:
        part (`Range`): Which part.
        cluster, max_line_bytes: As in `read_lines`.

    Yields:
        `Line`: One for each line that is not blank, numbered from 1.

    Returns:
        `int`: How many lines there were, blank ones included.
    """
    sidecar = load_sidecar(part.path, cluster)
    with _open(part.path) as stream:
        number = 0
        for origin, data in _raw_lines(stream, part, max_line_bytes):
            number = origin.line
            if data is None:
                yield Line(origin, "reject", "line_too_long", f"{origin.length} bytes in one line")
            elif data:
                yield judge(data, origin, sidecar, cluster)
    return number


def cluster_is_nowhere(cluster: str, rollouts: int) -> UserError:
    """The error where a cluster is named that no row has."""
    return UserError(
        f"none of the {rollouts} rollouts, nor any of their input rows, has {cluster!r}",
        remedy="give the dotted path of a key that the rows have, such as verifier_metadata.template",
    )


def read_bytes(origin: Origin) -> bytes:
    """The bytes of a line that was read before, without its line break.

    Raises:
        `UserError`: If the file is gone, or has changed since.
    """
    with _open(Path(origin.file)) as stream:
        stream.seek(origin.offset)
        data = stream.read(origin.length)
    if row_id(data) != origin.row_id:
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
    return judge(read_bytes(origin), origin, load_sidecar(Path(origin.file), cluster), cluster)


def read_asked(origin: Origin, *, cluster: str | None = None) -> Rollout | None:
    """Reads of a refused line what was asked and how it was rewarded; see `convert.asked_only`.

    Args:
        origin (`Origin`): Its place.
        cluster (`str`, *optional*): As in `read_lines`.

    Raises:
        `UserError`: If the file is gone, or has changed since.
    """
    return asked_only(read_bytes(origin), origin, load_sidecar(Path(origin.file), cluster), cluster)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=_CHUNK)
    except FileNotFoundError:
        raise UserError(f"{path} is gone", remedy="put it back, or run the stages again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy="check the path and its rights") from None


def _raw_lines(stream: BinaryIO, part: Range, limit: int) -> Iterator[tuple[Origin, bytes | None]]:
    """Lines with their places: of one above the limit `None`, of a blank one no bytes."""
    file = str(part.path)
    stop = math.inf if part.stop is None else part.stop
    offset = _first_line_from(stream, part.start, stop)
    number = 0
    while offset < stop and (raw := stream.readline(limit + 2)):
        number += 1
        start, offset = offset, offset + len(raw)
        length = _without_break(raw)
        cut = len(raw) == limit + 2 and not raw.endswith(b"\n")
        if cut or length > limit:
            size, length, identity = _skip(stream, raw)
            offset = start + size
            yield Origin(file, number, start, length, identity), None
        else:
            identity = row_id(memoryview(raw)[:length])
            # The line break stays: to JSON it is a space, and to take it off would copy the line.
            yield Origin(file, number, start, length, identity), b"" if raw.isspace() else raw


def _without_break(raw: bytes) -> int:
    """Bytes of a line up to the carriage returns and line feed at its end."""
    length = len(raw) - raw.endswith(b"\n")
    return length if not raw.endswith(b"\r", 0, length) else len(raw[:length].rstrip(b"\r\n"))


def _first_line_from(stream: BinaryIO, start: int, stop: float) -> int:
    """Goes to the first line that begins at `start` or after it, as far as `stop`; returns where that is."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    while stream.tell() < stop and (raw := stream.readline(_CHUNK)):
        if raw.endswith(b"\n"):
            break
    return stream.tell()


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


def row_id(data: bytes | memoryview) -> str:
    """First 16 hex digits of the SHA-256 of a line, without its line break."""
    return hashlib.sha256(data).hexdigest()[:16]
