"""What is installed, and what runs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gymtrl.gym.install import GymInstallation, find_installation, gym_home
from gymtrl.gym.servers import ServerInstance, find_running


class GymStatus(msgspec.Struct, frozen=True):
    """An installation and a running Gym, each `None` where there is none.

    Attributes:
        home (`str`): Where the installation was looked for.
        installation (`GymInstallation`, *optional*): What is installed there.
        head (`str`): The head server that was asked.
        servers (`tuple[ServerInstance, ...]`, *optional*): What it listed.
    """

    home: str
    installation: GymInstallation | None
    head: str
    servers: tuple[ServerInstance, ...] | None

    def to_json(self) -> str:
        """Returns the status as one JSON document."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode() + "\n"


def gym_status(home: Path | None, head: str) -> GymStatus:
    """Looks below `home` and asks the head server at `head`."""
    running = find_running(head)
    return GymStatus(str(gym_home(home)), find_installation(home), head, running.servers if running else None)


def render_status(status: GymStatus) -> str:
    """Returns the status as lines for a person."""
    installed = status.installation
    if installed is None:
        lines = [f"NeMo Gym is not installed below {status.home}; run 'gymtrl gym setup'"]
    else:
        lines = [f"nemo-gym {installed.version} in {installed.home}", f"  interpreter {installed.python}"]
        lines.append(f"  servers and their example data in {installed.site_packages}")
        lines.append(f"  packages for {', '.join(installed.servers)}")
    if status.servers is None:
        lines.append(f"nothing answers at {status.head}")
    else:
        lines.append(f"running at {status.head}:")
        lines += [f"  {s.process_name} ({s.server_type}) {s.url or ''}" for s in status.servers]
    return "\n".join(lines) + "\n"
