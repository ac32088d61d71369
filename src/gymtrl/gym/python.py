"""Finding an interpreter that NeMo Gym runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import RunError, UserError

# nemo-gym 0.4 asks for 3.12 or newer, 0.5 and later for 3.13.14 or newer (their Requires-Python). 3.12 comes first
# because it is what `constraints-gym.txt` pins packages for.
_OLDEST = (3, 12)


@dataclass(frozen=True)
class Interpreter:
    """A Python that runs.

    Attributes:
        path (`Path`): The executable.
        version (`tuple[int, int, int]`): Its version.
    """

    path: Path
    version: tuple[int, int, int]

    @property
    def fits(self) -> bool:
        """Whether some nemo-gym admits it."""
        return self.version >= _OLDEST

    def __str__(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} at {self.path}"


def find_python(wanted: str | None, uv: Path) -> Interpreter:
    """Returns the interpreter for Gym's environment: `wanted`, else the first 3.12, else one that newer Gyms admit.

    Args:
        wanted (`str`, *optional*): Path or name on PATH, as the user gave it.
        uv (`Path`): The uv executable, asked for the interpreters that it knows.

    Raises:
        UserError: `wanted` is no interpreter, or none that Gym runs on.
        RunError: Nothing fits on this machine.
    """
    if wanted is not None:
        found = _ask(Path(shutil.which(wanted) or wanted))
        if found is None:
            raise UserError(f"--python {wanted} is not a Python interpreter that runs", remedy="give its path")
        if not found.fits:
            raise UserError(f"NeMo Gym does not run on {found}", remedy="give a Python 3.12 or newer")
        return found
    seen: list[Interpreter] = []
    for path in _candidates(uv):
        found = _ask(path)
        if found is not None and found.version[:2] == (3, 12):
            return found
        if found is not None:
            seen.append(found)
    fitting = [i for i in seen if i.fits]
    if fitting:
        return max(fitting, key=lambda i: i.version)
    known = sorted({".".join(map(str, i.version)) for i in seen})
    raise RunError(
        f"no Python that NeMo Gym runs on (3.12 or newer); found: {', '.join(known) or 'none'}",
        remedy="install one, for example 'uv python install 3.12' or 'pyenv install 3.12', or give --python PATH",
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
