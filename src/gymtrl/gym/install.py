"""Gym's own environment: Gym and its servers' packages in one virtual environment that all servers share.

Gym builds an environment per server unless one is there already. One shared environment saves minutes at every start
and gigabytes on disk; it holds as long as the servers' requirements agree, which uv checks when it installs them.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from gymtrl.errors import RunError, UserError
from gymtrl.gym.python import Interpreter, find_python, oldest_python
from gymtrl.gym.settings import GymSetupSettings
from gymtrl.home import gymtrl_home

CONSTRAINTS = Path(__file__).with_name("constraints-gym.txt")
# What an environment of the simple kind needs beside its resources server; the last exists in Gym 0.5 and newer.
_COMMON = (
    ("responses_api_agents", "simple_agent"),
    ("responses_api_models", "vllm_model"),
    ("environment_servers", "legacy_agent"),
)
Say = Callable[[str], None]


class GymInstallation(msgspec.Struct, frozen=True):
    """A Gym that is ready to run.

    Attributes:
        home (`str`): Folder of the installation.
        python (`str`): Interpreter of Gym's environment.
        version (`str`): Version of nemo-gym.
        servers (`tuple[str, ...]`): Resources servers whose packages are installed.
    """

    home: str
    python: str
    version: str
    servers: tuple[str, ...]

    @property
    def gym(self) -> Path:
        """The `gym` command."""
        return Path(self.python).with_name("gym")

    @property
    def venv_links(self) -> Path:
        """Folder in which Gym looks for its servers' environments."""
        return Path(self.home) / "servers"

    @property
    def site_packages(self) -> Path:
        """Folder that holds Gym's packages, its servers and their example data among them."""
        return next((Path(self.python).parent.parent / "lib").glob("python3.*/site-packages"))


def gym_home(home: Path | None = None) -> Path:
    """Returns the folder of the installation: `home`, else `$GYMTRL_HOME/gym`, else `~/.cache/gymtrl/gym`."""
    return home.absolute() if home is not None else gymtrl_home() / "gym"


def find_installation(home: Path | None = None) -> GymInstallation | None:
    """Returns the installation below `home`, `None` where there is none or it is not whole."""
    try:
        found = msgspec.json.decode((gym_home(home) / "gym.json").read_bytes(), type=GymInstallation)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.gym.exists() else None


def require_installation(home: Path | None, servers: Sequence[str]) -> GymInstallation:
    """Returns the installation, which must have the packages of `servers`, each a name or `name/flavor`.

    Raises:
        UserError: There is none, or a server's packages are missing.
    """
    found = find_installation(home)
    names = dict.fromkeys(server.partition("/")[0] for server in servers)
    missing = [name for name in names if found is None or name not in found.servers]
    if found is None or missing:
        of = ", ".join(missing)
        what = "NeMo Gym is not installed" if found is None else f"the packages of Gym's {of} are not installed"
        raise UserError(f"{what} below {gym_home(home)}", remedy=f"run 'gymtrl gym setup {' '.join(missing)}'")
    return found


def setup_gym(settings: GymSetupSettings, say: Say = print) -> GymInstallation:
    """Creates or completes the installation. Does nothing where it already has what is asked for.

    Args:
        settings (`GymSetupSettings`): What to install, and where.
        say (`Callable[[str], None]`, *optional*, defaults to `print`): Receives one line per step.

    Raises:
        UserError: A server that this Gym does not have, or an unfit interpreter.
        RunError: No fitting interpreter, or an install step failed.
    """
    home, uv = gym_home(settings.home), uv_executable()
    found = find_installation(settings.home)
    wanted = dict.fromkeys([*(found.servers if found else ()), *settings.servers])
    asks = None if settings.ignore_requires_python else settings.version
    asked = find_python(settings.python, uv, asks) if settings.python else None
    same = asked is None or (found and Path(found.python).resolve() == asked.path.resolve())
    if found and same and settings.version in (None, found.version):
        if set(wanted) <= set(found.servers):
            say(f"nemo-gym {found.version} is installed in {found.home}")
            return found
        python, version = Path(found.python), found.version
    else:
        interpreter = asked or find_python(None, uv, asks)
        say(f"Gym's environment: {interpreter}")
        python, version = _make_environment(home, interpreter, settings, uv, say)
    installation = GymInstallation(str(home), str(python), version, tuple(wanted))
    _install_servers(installation, settings, uv, say)
    _link_environments(installation)
    draft = home / ".gym.json.partial"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(installation), indent=2))
    draft.replace(home / "gym.json")
    say(f"nemo-gym {version} is ready with {', '.join(wanted)}")
    return installation


def uv_executable() -> Path:
    """Returns the uv that was installed with this package, else the one on PATH.

    Raises:
        RunError: There is none.
    """
    try:
        from uv import find_uv_bin

        return Path(find_uv_bin())
    except (ImportError, FileNotFoundError):
        on_path = shutil.which("uv")
        if on_path is None:
            raise RunError("uv is not installed", remedy="pip install uv") from None
        return Path(on_path)


def _make_environment(
    home: Path, interpreter: Interpreter, settings: GymSetupSettings, uv: Path, say: Say
) -> tuple[Path, str]:
    environment, version = home / "env", settings.version
    (home / "gym.json").unlink(missing_ok=True)
    home.mkdir(parents=True, exist_ok=True)
    _run([str(uv), "venv", "--quiet", "--clear", "--python", str(interpreter.path), str(environment)], "create it")
    python = environment / "bin" / "python"
    say("installing nemo-gym (about 180 packages)")
    requirement = f"nemo-gym=={version}" if version else "nemo-gym"
    command = [
        *_pip_install(uv, python, version, settings),
        *_constraints(interpreter.version[1], version),
        requirement,
    ]
    _run(command, "install nemo-gym")
    shown = _run([str(uv), "pip", "show", "--python", str(python), "nemo-gym"], "read the version of nemo-gym")
    return python, next(line.split()[1] for line in shown.splitlines() if line.startswith("Version:"))


def _constraints(minor: int, version: str | None) -> list[str]:
    """The pins hold for one version of Gym on Python 3.12; anything else is resolved afresh."""
    pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("nemo-gym=="))
    fits = minor == 12 and version in (None, pinned.removeprefix("nemo-gym=="))
    return ["--constraints", str(CONSTRAINTS)] if fits else []


def _install_servers(installation: GymInstallation, settings: GymSetupSettings, uv: Path, say: Say) -> None:
    requirements: list[str] = []
    for server in installation.servers:
        requirements += _requirements(installation.site_packages / "resources_servers" / server)
    if requirements:
        say(f"installing what {', '.join(installation.servers)} need")
        minor = int(installation.site_packages.parent.name.removeprefix("python3."))
        constraints = _constraints(minor, installation.version)
        gym = f"nemo-gym=={installation.version}"
        _run(
            [
                *_pip_install(uv, Path(installation.python), installation.version, settings),
                *constraints,
                gym,
                *requirements,
            ],
            f"install the packages of {', '.join(installation.servers)}",
        )


def _requirements(folder: Path) -> list[str]:
    """Reads a server's requirements, without Gym itself, which they name by a path in its source tree."""
    if not folder.is_dir():
        names = sorted(p.parent.name for p in folder.parent.glob("*/app.py"))
        raise UserError(f"this Gym has no resources server '{folder.name}'", remedy=f"known: {', '.join(names)}")
    listed, project = folder / "requirements.txt", folder / "pyproject.toml"
    lines: list[str] = []
    if listed.exists():
        lines = [line.split("#")[0].strip() for line in listed.read_text().splitlines()]
    elif project.exists():
        lines = tomllib.loads(project.read_text()).get("project", {}).get("dependencies", [])
    return [line for line in lines if line and not line.startswith("-e") and not line.startswith("nemo-gym")]


def _link_environments(installation: GymInstallation) -> None:
    environment = Path(installation.python).parent.parent
    for kind, name in (*_COMMON, *(("resources_servers", s) for s in installation.servers)):
        if (installation.site_packages / kind / name).is_dir():
            link = installation.venv_links / kind / name / ".venv"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(environment, target_is_directory=True)


def _pip_install(uv: Path, python: Path, version: str | None, settings: GymSetupSettings) -> list[str]:
    command = [str(uv), "pip", "install", "--quiet", "--python", str(python)]
    if settings.ignore_requires_python:
        # uv then chooses packages as for that Python.
        command += ["--python-version", ".".join(map(str, oldest_python(version)))]
    return command


def _run(command: list[str], purpose: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(
            f"could not {purpose}:\n{done.stderr.strip()[-2000:]}",
            remedy="check the network and the package index, then run it again",
        )
    return done.stdout
