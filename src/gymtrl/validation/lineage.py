"""From which rollouts a checkpoint was trained, as the manifests on the way to it say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gymtrl.rollouts.sidecars import INPUTS_SUFFIX
from gymtrl.workspace.artefact import MANIFEST, Manifest, read_manifest, sha256_of

State = Literal["as it was", "changed", "gone"]


@dataclass(frozen=True)
class Origin:
    """Something that a training began with.

    Attributes:
        path (`Path`): Where it was: rollouts or the folder of a filter, or a model or an adapter.
        sha256 (`str`): As it was.
        kind (`str`): `rollouts` or `model`.
        state (`str`): Whether it is there now: `as it was`, `changed` or `gone`.
    """

    path: Path
    sha256: str
    kind: Literal["rollouts", "model"]
    state: State


def trained_on(checkpoint: Path) -> list[Origin]:
    """Follows a checkpoint back to the rollouts of its training, and of those that it began with.

    Args:
        checkpoint (`Path`): Folder that `train` wrote, or the model or adapter in it.

    Returns:
        `list[Origin]`: The rollouts, those of the last training first; and local models and adapters that are not as
            they were, so that what is known of their own training does not count. None where no manifest tells of a
            training. A model that was copied without its run's manifest counts as one that was not trained.
    """
    return list(dict.fromkeys(_origins(checkpoint, set())))


def _origins(checkpoint: Path, seen: set[Path]) -> Iterator[Origin]:
    folder = _run_folder(checkpoint)
    if folder is None or folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    manifest = read_manifest(folder)
    yield _rollouts(manifest.extra["dataset_inputs"])
    for name in _began_with(manifest):
        model = Origin(Path(name.path), name.sha256, "model", _state(Path(name.path), name.sha256))
        if model.state == "as it was":
            yield from _origins(model.path, seen)
        else:
            yield model


def _run_folder(checkpoint: Path) -> Path | None:
    for folder in (checkpoint, checkpoint.absolute().parent, checkpoint.resolve().parent):
        if (folder / MANIFEST).is_file() and read_manifest(folder).verb.startswith("train"):
            return folder
    return None


def _rollouts(inputs: list[dict[str, Any]]) -> Origin:
    """What a dataset was made of; the materialized inputs beside a rollout file belong to it."""
    path, sha256 = Path(inputs[0]["path"]), str(inputs[0]["sha256"])
    beside = str(path.with_name(f"{path.stem}{INPUTS_SUFFIX}.jsonl"))
    states = [_state(Path(one["path"]), one["sha256"]) for one in inputs if one["path"] in (inputs[0]["path"], beside)]
    state: State = "changed" if set(states[1:]) - {"as it was"} and states[0] == "as it was" else states[0]
    return Origin(path, sha256, "rollouts", state)


def _began_with(manifest: Manifest) -> list[Any]:
    """Inputs of a training that are local models; those of the hub are no inputs."""
    names = [Path(name) for name in (manifest.extra["model"], manifest.settings["adapter"]) if name]
    return [one for one in manifest.inputs if Path(one.path) in names]


def _state(path: Path, sha256: str) -> State:
    if not path.exists():
        return "gone"
    return "as it was" if sha256_of(path) == sha256 else "changed"
