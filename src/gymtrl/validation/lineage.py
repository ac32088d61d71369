"""From which rollouts a checkpoint was trained, as the manifests on the way to it say."""

from __future__ import annotations

from pathlib import Path

from gymtrl.workspace.artefact import MANIFEST, read_manifest


def trained_on(checkpoint: Path) -> list[Path]:
    """Follows a checkpoint back to the rollouts of its training, and of those that it began with.

    Args:
        checkpoint (`Path`): Folder that `train` wrote, or the model or adapter in it.

    Returns:
        `list[Path]`: Filter folders and rollout files, the last training first; none where no manifest tells of one.
    """
    found: list[Path] = []
    for folder in (checkpoint, checkpoint.parent):
        if (folder / MANIFEST).is_file() and (manifest := read_manifest(folder)).verb.startswith("train"):
            found += [Path(one["path"]) for one in manifest.extra["dataset_inputs"][:1]]
            began = (manifest.extra["model"], manifest.settings["adapter"])
            found += [source for one in began if one for source in trained_on(Path(one))]
            break
    return list(dict.fromkeys(found))
