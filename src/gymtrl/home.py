"""Where gymtrl keeps what it installs or makes once: Gym's environment, the small model."""

from __future__ import annotations

import os
from pathlib import Path


def gymtrl_home() -> Path:
    """Returns `$GYMTRL_HOME`, else `~/.cache/gymtrl`, as an absolute path."""
    named = os.environ.get("GYMTRL_HOME")
    return (Path(named) if named else Path.home() / ".cache" / "gymtrl").absolute()
