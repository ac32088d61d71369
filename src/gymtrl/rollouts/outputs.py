"""Where an output may be written: never over what it is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gymtrl.errors import UserError

from .scan import read_facts
from .sidecars import SIDECAR_SUFFIXES

_ENDINGS = ("", ".gz", ".zst")
_ANOTHER = "name another file"


def check_output(path: Path, inputs: Sequence[Path]) -> None:
    """Refuses an output that would destroy an input or that cannot be written. Nothing is read but names, and what a
    rollout table says of itself.

    Args:
        path (`Path`): The file to write; a regular file of that name may be replaced.
        inputs (`Sequence[Path]`): What is read, as the user named it: files, folders of them, a rollout table, `-`.

    Raises:
        `UserError`: If the output is a folder, a special file or in no folder, or if it is one of the inputs, a file
            that Gym wrote beside one, or one that a table among them was made from.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", remedy="name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: {path.parent} is no folder", remedy="make the folder first")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file", remedy=_ANOTHER)
    for source in _sources(inputs):
        if _same(path, source):
            raise UserError(f"{path} would be overwritten: it is an input", remedy=_ANOTHER)
        if any(_same(path, beside) for beside in _beside(source)):
            raise UserError(f"{path} would be overwritten: it belongs to the input {source}", remedy=_ANOTHER)


def _sources(inputs: Sequence[Path]) -> Iterator[Path]:
    for given in inputs:
        if given.is_dir():
            yield from given.glob("*rollouts*.jsonl*")
            continue
        yield given
        if given.suffix == ".parquet" and given.is_file() and (facts := read_facts(given)) is not None:
            yield from (Path(file.path) for file in facts.files)


def _beside(source: Path) -> Iterator[Path]:
    """Where Gym writes its other files, whether or not they are there."""
    stem, dot, _ = source.name.partition(".jsonl")
    if dot:
        for suffix in SIDECAR_SUFFIXES:
            yield from (source.with_name(f"{stem}{suffix}.jsonl{ending}") for ending in _ENDINGS)


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)  # a hard link as well
    return path.resolve() == other.resolve()
