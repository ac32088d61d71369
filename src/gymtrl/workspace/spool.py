"""Packed and piped input as plain files: rows are found again by their byte offset, so what is read stays in place."""

from __future__ import annotations

import gzip
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
from gymtrl.rollouts.inputs import packing, rollout_files
from gymtrl.rollouts.sidecars import SIDECAR_SUFFIXES
from gymtrl.workspace.artefact import sha256_of

_ENDINGS = (".jsonl.gz", ".jsonl.zst")


def spooled(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Copies what is packed or piped to plain files.

    Args:
        inputs (`Sequence[Path]`): Files, `.gz` and `.zst` among them, folders of them, pipes, and `-` for standard
            input.
        folder (`Path`): Where the plain files go; named by the content, so that the same input is unpacked once. The
            files that Gym wrote beside a packed one come along.

    Returns:
        `list[Path]`: `inputs` with the plain files in place of what was packed or piped.

    Raises:
        `UserError`: If a packed file is damaged.
    """
    plain: list[Path] = []
    for path in inputs:
        if str(path) == "-":
            plain.append(_keep(sys.stdin.buffer, folder, "stdin"))
        elif path.is_dir():
            packed = [file for ending in _ENDINGS for file in rollout_files(path, ending)]
            plain += [path] if rollout_files(path) or not packed else []
            plain += [_unpack(file, folder) for file in packed]
        elif path.exists() and not path.is_file():
            with path.open("rb") as stream:
                plain.append(_keep(stream, folder, "pipe"))
        elif path.is_file() and packing(path):
            plain.append(_unpack(path, folder))
        else:
            plain.append(path)
    return plain


def _keep(stream: BinaryIO, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.{os.getpid()}.partial"
    with draft.open("wb") as target:
        shutil.copyfileobj(stream, target, 1 << 20)
    if packed := packing(draft):
        with _opened(draft, packed) as unpacked:
            plain = _keep(unpacked, folder, f"{name}-unpacked")
        draft.unlink()
        return plain
    return draft.rename(folder / f"{name}-{sha256_of(draft)[:16]}-rollouts.jsonl")


def _unpack(path: Path, folder: Path) -> Path:
    stem, _, ending = path.name.partition(".jsonl")
    target = folder / f"{stem}-{sha256_of(path)[:16]}.jsonl"
    _unpack_to(path, target)
    for suffix in SIDECAR_SUFFIXES:
        for beside in (path.with_name(f"{stem}{suffix}.jsonl{end}") for end in dict.fromkeys((ending, ""))):
            if beside.is_file():
                _unpack_to(beside, target.with_name(f"{target.stem}{suffix}.jsonl"))
                break
    return target


def _unpack_to(path: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _opened(path, packing(path)) as source, draft.open("wb") as plain:
            shutil.copyfileobj(source, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        draft.unlink()
        raise UserError(f"{path} is damaged: {error}", remedy="copy it again from where it came") from None
    draft.rename(target)


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        if packed == "gzip":
            with gzip.open(raw) as stream:
                yield stream  # type: ignore[misc]
        elif packed == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                yield stream
        else:
            yield raw
