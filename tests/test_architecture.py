"""Imports point one way, and light rooms stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gymtrl"
LEAVES = {"errors", "home", "processes", "text"}
ALLOWED = {
    "rollouts": set(),
    "workspace": {"rollouts"},
    "models": set(),
    "serving": {"models"},
    "gym": set(),
    "selection": {"rollouts", "workspace"},
    "comparison": {"rollouts"},
    "formats": {"rollouts", "selection", "models", "workspace"},
    "doctor": {"rollouts", "comparison", "workspace"},
    "training": {"doctor", "models", "workspace"},
    "exports": {"rollouts", "models", "workspace"},
    "validation": {"rollouts", "gym", "serving", "selection", "comparison", "workspace"},
    "reports": {"rollouts", "selection", "formats", "comparison", "doctor", "workspace"},
    "pipeline": {
        "rollouts",
        "selection",
        "formats",
        "exports",
        "training",
        "gym",
        "comparison",
        "validation",
        "reports",
        "workspace",
    },
}
ON_TOP = {"demo", "cli"}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            above = ["gymtrl", *file.relative_to(SOURCE).parts[: -node.level]] if node.level else []
            names = [".".join([*above, node.module or ""])]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("gymtrl.")}
    return found


def test_every_room_is_known() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert rooms == ALLOWED.keys() | ON_TOP


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room: str) -> None:
    used = set().union(*(imported(file) for file in (SOURCE / room).rglob("*.py")))
    assert used <= ALLOWED[room] | LEAVES | {room}


@pytest.mark.parametrize(
    "module",
    [
        "gymtrl",
        "gymtrl.rollouts.reader",
        "gymtrl.selection.filter",
        "gymtrl.selection.pairs",
        "gymtrl.comparison.compare",
        "gymtrl.exports.export",
        "gymtrl.pipeline.run",
        "gymtrl.doctor.diagnose",
        "gymtrl.doctor.read",
        "gymtrl.doctor.worse",
        "gymtrl.cli.main",
    ],
)
def test_light_rooms_start_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(n in sys.modules for n in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_resolve() -> None:
    import gymtrl

    assert all(getattr(gymtrl, name) is not None for name in gymtrl.__all__)
