"""Folders that stages write: whole under their final name, or absent.

A stage writes into a hidden sibling of its output folder, which is renamed when everything, the manifest included, is
there. Whoever sees a folder under its final name may therefore rely on it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

from gymtrl import __version__
from gymtrl.errors import GymtrlError, RunError, UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_IDENTITY = ".identity.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("no space left", "file too large", "disk quota exceeded", "failed writing file", "pytorchstreamwriter")
_LOG = logging.getLogger(__name__)
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
        raise UserError(message, remedy="remove the folder, or choose another one") from None
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
    deciding = _deciding(settings)
    used = {name: value for name, value in manifest.settings.items() if name in deciding}
    same = (manifest.verb, used, manifest.inputs, manifest.versions.get("gymtrl")) == (
        verb,
        deciding,
        _hashes(inputs),
        __version__,
    )
    return manifest if same else None


@contextmanager
def artefact(
    out: Path,
    *,
    verb: str,
    settings: BaseModel,
    inputs: Sequence[Path],
    resumable: bool = False,
    resumed_by: Collection[str] | None = None,
) -> Iterator[Draft]:
    """Opens a folder in the making and gives it its name when the block ends without an exception.

    Args:
        out (`Path`): The folder to be; an older artefact of that name is replaced, anything else refused.
        verb (`str`): The stage, as on the command line.
        settings (`BaseModel`): Its resolved settings; secrets are masked by their type.
        inputs (`Sequence[Path]`): Files and folders that it reads.
        resumable (`bool`, *optional*, defaults to `False`): Keep what was written when the block fails, and hand it to
            the next call with the same verb, settings and inputs.
        resumed_by (`Collection[str]`, *optional*): Names of the settings that what is kept was made with, where the
            others come in only at the end.

    A setting whose field says `json_schema_extra={"changes_result": False}`, such as a time-out, may differ between the
    interrupted run and the next.

    Raises:
        UserError: `out` holds something else or one of the inputs, or another process is writing it.
        RunError: The disk is full or not writable.
    """
    _refuse_foreign(out, verb, inputs)
    partial = out.parent / f".{out.name}.partial"
    started = _now()
    hashes = _hashes(inputs)
    kept = {name: value for name, value in _deciding(settings).items() if resumed_by is None or name in resumed_by}
    identity = msgspec.json.encode({"verb": verb, "settings": kept, "inputs": hashes})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        resumed = resumable and _same_identity(partial, identity)
        if resumable and not resumed and partial.exists():
            _LOG.warning("what an interrupted run left for %s was made with other inputs or settings: discarded", out)
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
            (partial / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
            _put_in_place(partial, out)
            # Last, so that a failure on the way leaves a folder that the next run goes on with.
            (out / _IDENTITY).unlink()
    except GymtrlError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise RunError(
                f"the disk is full: cannot write {out}: {error}",
                remedy="free some disk space, or choose a folder on another disk with -o",
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Tells whether a failure comes from a full disk; torch and safetensors say so only in words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen).lower() for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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


def _refuse_foreign(out: Path, verb: str, inputs: Sequence[Path]) -> None:
    another = "choose another folder with -o"
    if not out.name or out.name == "..":
        raise UserError(f"'{out}' is no name for a folder to write", remedy=another)
    if any(path.resolve().is_relative_to(out.resolve()) for path in inputs):
        raise UserError(f"{out} holds what '{verb}' reads", remedy=another)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and was not written by gymtrl", remedy=another)
    if (found := read_manifest(out).verb) != verb:
        raise UserError(f"{out} holds what '{found}' wrote, not '{verb}'", remedy=another)


def _deciding(settings: BaseModel) -> dict[str, Any]:
    """The settings that decide the result."""
    fields = type(settings).model_fields
    extras = {name: field.json_schema_extra for name, field in fields.items()}
    idle = {name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("changes_result") is False}
    return settings.model_dump(mode="json", exclude=idle)


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
