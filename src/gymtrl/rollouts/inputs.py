"""Which files a user means, and what to say when there is nothing in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gymtrl.errors import UserError

from .sidecars import is_sidecar

PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a packed file, and the program that packed it."""

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
        inputs (`Sequence[Path]`): Files, taken as they are, and folders, of which every `*rollouts*.jsonl` directly in
            them is taken that is no sidecar.

    Returns:
        `list[Path]`: Each file once, in order.

    Raises:
        `UserError`: If one is missing, packed, or a folder without rollout files.
    """
    files: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            found = rollout_files(given)
            if not found:
                raise UserError(f"{given} holds no *rollouts*.jsonl", remedy=_below(given))
            for path in found:
                files.setdefault(path.resolve(), path)
        elif not given.exists():
            raise UserError(f"{given} does not exist", remedy=_neighbours(given))
        elif not given.is_file():
            raise UserError(f"{given} is no file that can be read twice", remedy=f"pipe it in: ... - < {given}")
        elif packed := packing(given):
            raise UserError(f"{given} is compressed", remedy=f"unpack it first: {_UNPACK[packed]} {given}")
        else:
            files.setdefault(given.resolve(), given)
    if not files:
        raise UserError("no rollout file was named", remedy="name a JSONL file that NeMo Gym wrote, or its folder")
    return list(files.values())


def rollout_files(folder: Path, suffix: str = ".jsonl") -> list[Path]:
    """The rollout files directly in a folder, without sidecars, sorted."""
    found = (path for path in folder.glob(f"*rollouts*{suffix}") if path.is_file())
    return sorted(path for path in found if not is_sidecar(path))


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


def _below(folder: Path) -> str:
    deeper = sorted({path.parent for path in folder.glob("*/*rollouts*.jsonl")})
    if deeper:
        return f"its subfolders hold some; name one of them: {', '.join(map(str, deeper[:3]))}"
    return "name the file itself"


def _neighbours(path: Path) -> str:
    found = sorted(str(p) for p in path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
    return f"{path.parent} holds {', '.join(found[:4])}" if found else "check the path"
