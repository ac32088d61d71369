"""Trackers that a run reports to through TRL's `report_to`: whether they are there, and where they write."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from gymtrl.errors import UserError
from gymtrl.workspace.settings import nearest

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
}
"""Packages of which one is needed; the first is what we tell people to install."""

_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"


def check_trackers(names: Sequence[str]) -> None:
    """Checks that a run can report to its trackers, before anything is loaded.

    Of others that transformers knows (`comet_ml`, `swanlab` …) only the name is checked.

    Args:
        names (`Sequence[str]`): Those of `report_to`; `none` is no tracker.

    Raises:
        UserError: A tracker is unknown, or its package is not installed.
    """
    for name in names:
        if name == "none":
            continue
        if name in _PACKAGES:
            packages = _PACKAGES[name]
            if not any(importlib.util.find_spec(package) for package in packages):
                raise UserError(
                    f"report_to {name} needs the package '{packages[0]}', which is not installed",
                    remedy=f"pip install {packages[0]}, or leave '{name}' out of report_to",
                )
            continue
        from transformers.integrations import INTEGRATION_TO_CALLBACK

        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to: no tracker '{name}'{nearest(name, INTEGRATION_TO_CALLBACK)}",
                remedy=f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
            )


def place_trackers(names: Sequence[str], run: Path) -> None:
    """Has TensorBoard write into `tensorboard/` of a run folder; by itself it writes among the checkpoints.

    The others write where their own settings say, such as `WANDB_DIR`, `TRACKIO_DIR` or `MLFLOW_TRACKING_URI`, so that
    they find a run beside those made with other tools.

    Args:
        names (`Sequence[str]`): Those of `report_to`.
        run (`Path`): The run folder.
    """
    if "tensorboard" in names:
        os.environ.setdefault(_TENSORBOARD_FOLDER, str(run / "tensorboard"))
