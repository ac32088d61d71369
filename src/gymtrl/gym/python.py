"""Finding an interpreter that NeMo Gym runs on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import RunError, UserError

# What nemo-gym asks for (its Requires-Python), by the version from which it does.
_OLDEST = {(0, 5): (3, 13, 14), (0, 0): (3, 12, 0)}


@dataclass(frozen=True)
class Interpreter:
    """A Python that runs.

    Attributes:
        path (`Path`): The executable.
        version (`tuple[int, int, int]`): Its version.
    """

    path: Path
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} at {self.path}"


def oldest_python(gym: str | None) -> tuple[int, int, int]:
    """Returns the oldest Python that a version of nemo-gym runs on; that any does, where none is named.

    Raises:
        UserError: What is named is no version.
    """
    numbers = re.findall(r"\d+", gym or "0.0")
    if not numbers:
        raise UserError(f"'{gym}' is no version of nemo-gym", remedy="give its number, such as 0.4.0, or leave it out")
    return next(oldest for since, oldest in _OLDEST.items() if tuple(map(int, numbers[:2])) >= since)


def find_python(wanted: str | None, uv: Path, gym: str | None = None) -> Interpreter:
    """Returns the interpreter for Gym's environment.

    Args:
        wanted (`str`, *optional*): Path, name on PATH, or version (`3.13`), as the user gave it. By default a 3.12,
            which `constraints-gym.txt` pins packages for, else the newest that fits.
        uv (`Path`): The uv executable, asked for the interpreters that it knows.
        gym (`str`, *optional*): Version of nemo-gym that it has to run; any by default.

    Raises:
        UserError: `wanted` is no interpreter, or none that Gym runs on.
        RunError: Nothing fits on this machine.
    """
    oldest, name = oldest_python(gym), f"nemo-gym {gym}" if gym else "NeMo Gym"
    needs = f"{'.'.join(map(str, oldest)).removesuffix('.0')} or newer"
    asked = wanted if wanted and re.fullmatch(r"\d+(\.\d+){1,2}", wanted) else None
    if wanted is not None and asked is None:
        found = _ask(Path(shutil.which(wanted) or wanted))
        if found is None:
            raise UserError(f"--python {wanted} is not a Python interpreter that runs", remedy="give its path")
        if found.version < oldest:
            raise UserError(f"{name} does not run on {found}", remedy=f"give a Python {needs}")
        return found
    numbers = tuple(map(int, asked.split("."))) if asked else ()
    seen = [found for path in _candidates(uv) if (found := _ask(path))]
    fitting = [i for i in seen if i.version >= oldest and i.version[: len(numbers)] == numbers]
    if fitting:
        return max(fitting, key=lambda i: (i.version[:2] == (3, 12), i.version))
    known = ", ".join(sorted({".".join(map(str, i.version)) for i in seen})) or "none"
    install = asked or ".".join(map(str, oldest[:2]))
    raise RunError(
        f"no Python{f' {asked}' if asked else ''} that {name} runs on ({needs}) on PATH, in pyenv or in uv; "
        f"found: {known}",
        remedy=f"'uv python install {install}' or 'pyenv install {install}', or give --python PATH",
    )


def _candidates(uv: Path) -> Iterator[Path]:
    for name in ("python3.12", "python3", "python3.13", "python3.14"):
        on_path = shutil.which(name)
        if on_path:
            yield Path(on_path)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from sorted(pyenv.glob("*/bin/python"), reverse=True)
    try:
        listed = subprocess.run(
            [str(uv), "python", "list", "--only-installed", "--offline", "--no-config"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in listed.splitlines():
        fields = line.split()
        if len(fields) > 1:
            yield Path(fields[1])


def _ask(path: Path) -> Interpreter | None:
    """Runs the interpreter: a pyenv shim exists for versions that are not active, and answers with an error."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        answer = subprocess.run([str(path), "-c", code], capture_output=True, text=True, timeout=30, check=False)
        major, minor, patch = (int(n) for n in answer.stdout.split())
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return Interpreter(path, (major, minor, patch))
