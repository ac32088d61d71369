"""Folders that stages write: whole under their final name, or absent.

A stage writes into a hidden sibling of its output folder, which is renamed when everything, the manifest included, is
there. Whoever sees a folder under its final name may therefore rely on it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

from gymtrl import __version__
from gymtrl.errors import RunError, UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_IDENTITY = ".identity.json"
_PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch", "polars", "msgspec", "numpy", "scipy")


class Counts(msgspec.Struct, frozen=True):
    """What became of a stage's rows: `read` equals `written` plus the sum of `dropped`.

    Attributes:
        read (`int`): Rows that came in.
        written (`int`): Rows that went out.
        dropped (`dict[str, int]`): Rows that did not, by reason code.
    """

    read: int
    written: int
    dropped: dict[str, int] = msgspec.field(default_factory=dict)


class InputHash(msgspec.Struct, frozen=True):
    """An input as it was when the stage read it.

    Attributes:
        path (`str`): File or folder.
        sha256 (`str`): Of a file its bytes; of an artefact folder its manifest; of another folder its files and names.
    """

    path: str
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """`manifest.json` of an artefact folder."""

    schema_version: int
    verb: str
    settings: dict[str, Any]
    inputs: list[InputHash]
    counts: Counts | None
    versions: dict[str, str]
    started: str
    ended: str
    extra: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass
class Draft:
    """A folder in the making.

    Attributes:
        path (`Path`): Where to write; it gets its final name when the stage ends.
        resumed (`bool`): The folder holds what an interrupted run of the same stage left.
        counts (`Counts`, *optional*): To be set by the stage where it turns rows into rows.
        extra (`dict[str, Any]`): Further facts for the manifest, JSON-able.
    """

    path: Path
    resumed: bool = False
    counts: Counts | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def sha256_of(path: Path) -> str:
    """Hashes a file or folder as `InputHash` describes. Returns 64 hex digits."""
    if path.is_dir():
        manifest = path / MANIFEST
        if manifest.is_file():
            return sha256_of(manifest)
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path)}\0{sha256_of(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an artefact folder.

    Raises:
        UserError: The folder does not exist, is not an artefact, or was written by a newer version.
    """
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a folder that gymtrl wrote: it has no {MANIFEST}",
            remedy="give the folder that the stage before wrote (its -o)",
        ) from None
    except msgspec.MsgspecError as error:
        message = f"{path}: not a manifest of gymtrl: {error}"
        raise UserError(message, remedy="run the stage that wrote it again") from None
    if manifest.schema_version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {manifest.schema_version}, this gymtrl reads up to {SCHEMA_VERSION}",
            remedy="upgrade gymtrl",
        )
    return manifest


def up_to_date(out: Path, *, verb: str, settings: BaseModel, inputs: Sequence[Path]) -> Manifest | None:
    """Returns the manifest of `out` if the same stage of this version made it from the same bytes and settings.

    `None` otherwise.
    """
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    same = (manifest.verb, manifest.settings, manifest.inputs, manifest.versions.get("gymtrl")) == (
        verb,
        settings.model_dump(mode="json"),
        _hashes(inputs),
        __version__,
    )
    return manifest if same else None


@contextmanager
def artefact(
    out: Path, *, verb: str, settings: BaseModel, inputs: Sequence[Path], resumable: bool = False
) -> Iterator[Draft]:
    """Opens a folder in the making and gives it its name when the block ends without an exception.

    Args:
        out (`Path`): The folder to be; an older artefact of that name is replaced, anything else refused.
        verb (`str`): The stage, as on the command line.
        settings (`BaseModel`): Its resolved settings; secrets are masked by their type.
        inputs (`Sequence[Path]`): Files and folders that it reads.
        resumable (`bool`, *optional*, defaults to `False`): Keep what was written when the block fails, and hand it to
            the next call with the same verb, settings and inputs.

    Raises:
        UserError: `out` holds something else, or another process is writing it.
        RunError: The disk is full or not writable.
    """
    _refuse_foreign(out)
    partial = out.parent / f".{out.name}.partial"
    started = _now()
    hashes = _hashes(inputs)
    identity = msgspec.json.encode({"verb": verb, "settings": settings.model_dump(mode="json"), "inputs": hashes})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        resumed = resumable and _same_identity(partial, identity)
        with _exclusive(partial, keep=resumed):
            (partial / _IDENTITY).write_bytes(identity)
            draft = Draft(partial, resumed=resumed)
            try:
                yield draft
            except BaseException:
                if not resumable:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                verb=verb,
                settings=settings.model_dump(mode="json"),
                inputs=hashes,
                counts=_checked(draft.counts),
                versions=versions(),
                started=started,
                ended=_now(),
                extra=draft.extra,
            )
            (partial / _IDENTITY).unlink()
            (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
            _put_in_place(partial, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        raise RunError(
            f"cannot write {out}: {error.strerror}",
            remedy="free some disk space, or choose another folder with -o",
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python, gymtrl and the installed packages that can change a result."""
    found = {"python": platform.python_version(), "gymtrl": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _hashes(inputs: Sequence[Path]) -> list[InputHash]:
    hashes = []
    for path in inputs:
        try:
            hashes.append(InputHash(str(path), sha256_of(path)))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist", remedy="check the path") from None
    return hashes


def _refuse_foreign(out: Path) -> None:
    if out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST).is_file()):
        return
    if out.exists():
        raise UserError(f"{out} exists and was not written by gymtrl", remedy="choose another folder with -o")


def _same_identity(partial: Path, identity: bytes) -> bool:
    try:
        return (partial / _IDENTITY).read_bytes() == identity
    except OSError:
        return False


@contextmanager
def _exclusive(partial: Path, *, keep: bool) -> Iterator[None]:
    """Holds a lock on the folder itself, which the kernel drops when the process ends, however it ends."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {partial.parent / partial.name[1:].removesuffix('.partial')}",
                remedy="wait for it, or choose another folder with -o",
            ) from None
        if not keep:
            for entry in partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def _checked(counts: Counts | None) -> Counts | None:
    if counts is not None and counts.read != counts.written + sum(counts.dropped.values()):
        raise AssertionError(f"rows were lost: {counts}")
    return counts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
