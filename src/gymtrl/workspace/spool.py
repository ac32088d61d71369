"""Packed and piped input as plain files: rows are found again by their byte offset, so what is read stays in place."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from gymtrl.errors import UserError
from gymtrl.rollouts.inputs import name_files, packing
from gymtrl.rollouts.sidecars import SIDECAR_SUFFIXES
from gymtrl.workspace.artefact import sha256_of

_HIDDEN = ".spooled"  # a folder of its own, or the copies would be rollout files of the user's folder
_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 14  # zstd may hold a thousandfold and more, and all that a chunk holds is in memory at once
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def spooled(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Copies what is packed or piped to plain files.

    Args:
        inputs (`Sequence[Path]`): Files, `.gz` and `.zst` among them, patterns and folders of them, pipes, and `-` for
            standard input.
        folder (`Path`): The plain files go to `.spooled` in it, named by the content, so that the same input is
            unpacked once. The files that Gym wrote beside a packed one come along.

    Returns:
        `list[Path]`: The files that are meant, the plain ones in place of what was packed or piped.

    Raises:
        `UserError`: If a packed file is damaged, a folder holds no rollout files, or a pattern matches none.
    """
    return [_plain(path, folder / _HIDDEN) for path in name_files(inputs)]


def as_spooled(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Tells what `spooled` would return, and writes nothing: what it has not unpacked yet stays as it is.

    Args:
        inputs (`Sequence[Path]`): As of `spooled`.
        folder (`Path`): As of `spooled`.

    Raises:
        `UserError`: If a folder holds no rollout files, or a file is missing.
    """
    files = []
    for path in name_files(inputs):
        if not (path.exists() or str(path) == "-"):
            raise UserError(f"{path} does not exist", remedy="check the path")
        plain = next(iter(_unpacked(path, folder / _HIDDEN))) if path.is_file() and packing(path) else path
        files.append(plain if plain.exists() else path)
    return files


def _plain(path: Path, store: Path) -> Path:
    if str(path) == "-":
        return _keep(sys.stdin.buffer, store / "stdin", "standard input")
    if path.exists() and not path.is_file():
        with path.open("rb") as stream:
            return _keep(stream, store / "pipe", str(path))
    return _unpack(path, store) if path.is_file() and packing(path) else path


def _keep(stream: BinaryIO, target: Path, name: str) -> Path:
    with _draft(target) as given, _draft(target.with_name(f"{target.name}-unpacked")) as unpacked:
        with given.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
        plain = unpacked if packing(given) else given
        if plain == unpacked:
            _copy(given, unpacked, name)
        return plain.rename(target.with_name(f"{target.name}-{sha256_of(plain)[:16]}-rollouts.jsonl"))


def _unpacked(path: Path, store: Path) -> dict[Path, Path]:
    """Where the plain files of a packed one belong, itself first → what they are made of."""
    stem, _, ending = path.name.partition(".jsonl")
    files = {"": path}
    for suffix in SIDECAR_SUFFIXES:
        beside = [path.with_name(f"{stem}{suffix}.jsonl{end}") for end in (ending, "")]
        if there := [file for file in beside if file.is_file()]:
            files[suffix] = there[0]
    hashes = "".join(f"{suffix} {sha256_of(file)}\n" for suffix, file in files.items())
    name = f"{stem}-{hashlib.sha256(hashes.encode()).hexdigest()[:16]}"
    return {store / f"{name}{suffix}.jsonl": file for suffix, file in files.items()}


def _unpack(path: Path, store: Path) -> Path:
    targets = _unpacked(path, store)
    for target, file in targets.items():
        if not target.exists():
            with _draft(target) as draft:
                _copy(file, draft, str(file))
                draft.rename(target)
    return next(iter(targets))


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A path to write to and to rename; what was not renamed is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _copy(source: Path, target: Path, name: str) -> None:
    """Copies a file, unpacking it; errors call it `name`."""
    packed = packing(source)
    try:
        with source.open("rb") as raw, target.open("wb") as plain:
            if packed == "zstd":
                _unpack_zstd(raw, plain)
            elif packed == "gzip":
                with gzip.open(raw) as unpacked:
                    shutil.copyfileobj(unpacked, plain, _CHUNK)
            else:
                shutil.copyfileobj(raw, plain, _CHUNK)
    except _DAMAGE as error:
        raise UserError(f"{name} is damaged: {error}", remedy="copy it again from where it came") from None


def _unpack_zstd(raw: BinaryIO, plain: BinaryIO) -> None:
    """Unpacks frame by frame: zstandard's own stream reader takes a frame that is cut off for a whole one."""
    frame = None
    while rest := raw.read(_ZSTD_CHUNK):
        while rest:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            plain.write(frame.decompress(rest))
            rest = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends before its last frame does")
