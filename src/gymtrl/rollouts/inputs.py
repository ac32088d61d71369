"""Which files a user means, and what to say when there is nothing in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path

from gymtrl.errors import UserError

from .sidecars import SIDECAR_SUFFIXES, is_sidecar

PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a packed file, and the program that packed it."""

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_UNPACK = {"gzip": "gunzip -k", "zstd": "unzstd"}
_SEEMS = {
    "malformed_json": "it is not JSONL, one JSON object a line",
    "not_object": "its lines are JSON, but no objects",
    "failure_row": "it holds failed attempts (X_failures.jsonl); the rollouts stand in X.jsonl beside it",
    "task_only": "it is a task file, the input of a collection; collect rollouts with it first",
    "materialized_input": "it holds the inputs of a run (X_materialized_inputs.jsonl); "
    "the rollouts stand in X.jsonl beside it",
    "reward_profile": "it is a reward profile; the rollouts that it was computed from stand in another file",
    "episode_result": "it holds episode results, without the chats",
    "custom_record": "its rows have neither responses_create_params nor response: "
    "NeMo Gym's rollout collection did not write it",
}


def expand_inputs(inputs: Sequence[Path]) -> list[Path]:
    """The rollout files that are meant.

    Args:
        inputs (`Sequence[Path]`): As in `name_files`.

    Returns:
        `list[Path]`: Each file once, in order.

    Raises:
        `UserError`: If one is missing, packed, or a folder without rollout files, or if a pattern matches none.
    """
    files: dict[Path, Path] = {}
    for path in name_files(inputs):
        if not path.exists():
            raise UserError(f"{path} does not exist", remedy=_neighbours(path))
        if not path.is_file():
            raise UserError(f"{path} is no file that can be read twice", remedy=f"pipe it in: ... - < {path}")
        if packed := packing(path):
            raise UserError(f"{path} is compressed", remedy=f"unpack it first: {_UNPACK[packed]} {path}")
        files.setdefault(path.resolve(), path)
    if not files:
        raise UserError("no rollout file was named", remedy="name a JSONL file that NeMo Gym wrote, or its folder")
    return list(files.values())


def name_files(inputs: Sequence[Path]) -> list[Path]:
    """Puts names of files in place of folders and patterns.

    Args:
        inputs (`Sequence[Path]`): Files, taken as they are; patterns as in `expand_patterns`; and folders, of which
            every `*rollouts*.jsonl` directly in them is taken that is no sidecar, packed ones among them.

    Returns:
        `list[Path]`: In order; whether they exist and can be read is not looked at.

    Raises:
        `UserError`: If a folder holds no rollout files, or a pattern matches none.
    """
    files: list[Path] = []
    for given in expand_patterns(inputs):
        found = rollout_files(given) if given.is_dir() else [given]
        if not found:
            raise UserError(f"{given} holds no *rollouts*.jsonl", remedy=_below(given))
        files += found
    return files


def expand_patterns(inputs: Sequence[Path]) -> list[Path]:
    """Puts what a pattern matches in its place, as a shell does; of a folder that it matches, the rollout files.

    Args:
        inputs (`Sequence[Path]`): A path is a pattern if it does not exist and holds `*`, `?` or `[`; `**` goes through
            folders. A pattern takes sidecars only where it names them, as in `*_failures.jsonl`.

    Returns:
        `list[Path]`: The other paths as they are, and what was matched sorted, each once.

    Raises:
        `UserError`: If a pattern matches no file.
    """
    paths: list[Path] = []
    for given in inputs:
        if given.exists() or set(str(given)).isdisjoint("*?["):
            paths.append(given)
            continue
        wanted = [suffix for suffix in SIDECAR_SUFFIXES if suffix[1:] in given.name]
        matched: list[Path] = []
        for path in map(Path, glob(str(given), recursive=True)):
            if path.is_dir():
                matched += rollout_files(path)
            elif wanted or not is_sidecar(path):
                matched.append(path)
        if not matched:
            raise UserError(f"no file matches {given}", remedy="check the path; ** stands for folders of any depth")
        paths += _one_each(sorted(set(matched)))
    return paths


def rollout_files(folder: Path) -> list[Path]:
    """The rollout files directly in a folder, sorted, without sidecars and without packed copies of plain ones."""
    found = (path for path in folder.glob("*rollouts*.jsonl*") if path.is_file() and path.name.endswith(_ENDINGS))
    return _one_each(sorted(path for path in found if not is_sidecar(path)))


def require_rollouts(files: Sequence[Path], verdicts: Mapping[str, int]) -> None:
    """Refuses inputs that hold no rollout, saying what they seem to hold.

    Args:
        files (`Sequence[Path]`): What was read.
        verdicts (`Mapping[str, int]`): Lines by verdict and reason: `ok`, `context:…`, `reject:…`, `skip:…`.

    Raises:
        `UserError`: If there is no line, or none is `ok` or `context`.
    """
    names = ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    total = sum(verdicts.values())
    if not total:
        raise UserError(f"{names} has no rows", remedy="check that the collection ran: gym eval run --output FILE")
    if any(verdict == "ok" or verdict.startswith("context:") for verdict in verdicts):
        return
    ranked = sorted(verdicts.items(), key=lambda pair: (-pair[1], pair[0]))
    counts = ", ".join(f"{verdict} {n}" for verdict, n in ranked)
    reason = ranked[0][0].partition(":")[2]
    raise UserError(
        f"none of the {total} rows of {names} is a rollout that can be used: {counts}",
        remedy=_SEEMS.get(reason) or f"gymtrl inspect {files[0]} shows file, line and cause of each",
    )


def packing(path: Path) -> str:
    """The program that packed a file, `gzip` or `zstd`; `""` where it is plain."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for magic, name in PACKED.items() if start.startswith(magic)), "")


def _one_each(files: Sequence[Path]) -> list[Path]:
    there = set(files)
    return [file for file in files if there.isdisjoint(_plainer(file))]


def _plainer(file: Path) -> list[Path]:
    """The names that the same rollouts have if less is to be done to read them."""
    ending = next((ending for ending in _ENDINGS if file.name.endswith(ending)), "")
    bare = file.name.removesuffix(ending)
    return [file.with_name(bare + other) for other in _ENDINGS[: _ENDINGS.index(ending)]] if ending else []


def _below(folder: Path) -> str:
    deeper = sorted({(folder / name).parent for name in glob("*/*rollouts*.jsonl*", root_dir=folder)})
    if deeper:
        return f"its subfolders hold some; name one of them: {', '.join(map(str, deeper[:3]))}"
    return "name the file itself"


def _neighbours(path: Path) -> str:
    found = sorted(str(p) for p in path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
    return f"{path.parent} holds {', '.join(found[:4])}" if found else "check the path"
