"""Starting Gym's servers on free ports, watching them, and stopping them with everything that they started."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import yaml

from gymtrl.errors import RunError, UserError
from gymtrl.gym.install import GymInstallation, uv_executable
from gymtrl.processes import Supervised

_START_SECONDS = 300.0
_STOP_SECONDS = 30.0


class ServerInstance(msgspec.Struct, frozen=True):
    """One running server, as Gym's head server lists it.

    Attributes:
        process_name (`str`): Its name in Gym's configuration; an agent's name is what task rows refer to.
        server_type (`str`): `resources_servers`, `responses_api_agents`, `responses_api_models` and so on.
        url (`str`, *optional*): Where it answers.
    """

    process_name: str
    server_type: str
    url: str | None = None


@dataclass(frozen=True)
class RunningGym:
    """A Gym that answers.

    Attributes:
        head (`str`): URL of its head server.
        servers (`tuple[ServerInstance, ...]`): Its servers.
        check (`Callable[[], None]`): Raises `RunError` when what we started has ended; does nothing for others' Gyms.
    """

    head: str
    servers: tuple[ServerInstance, ...]
    check: Callable[[], None] = lambda: None

    def agent_url(self, name: str) -> str:
        """Returns the URL of an agent.

        Raises:
            UserError: No such agent runs.
        """
        agents = {s.process_name: s.url for s in self.servers if s.server_type == "responses_api_agents"}
        url = agents.get(name)
        if url is None:
            raise UserError(f"no agent '{name}' runs at {self.head}", remedy=f"running agents: {', '.join(agents)}")
        return url


def find_running(head: str) -> RunningGym | None:
    """Asks a head server for its servers; `None` where nothing answers."""
    try:
        answer = httpx.get(f"{head.rstrip('/')}/server_instances", timeout=5.0, trust_env=False)
        answer.raise_for_status()
        return RunningGym(head, tuple(msgspec.json.decode(answer.content, type=list[ServerInstance])))
    except (httpx.HTTPError, msgspec.MsgspecError):
        return None


@contextmanager
def running_gym(
    installation: GymInstallation,
    *,
    server: str,
    policy_url: str,
    policy_name: str,
    folder: Path,
    tick: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Callable[[], RunningGym]]:
    """Starts Gym with one resources server, its agent and the policy's model server, and stops it at the end.

    Yields a function that waits until everything answers, so that other things can start meanwhile. The endpoint behind
    `policy_url` may come up later and be replaced while Gym runs.

    Args:
        installation (`GymInstallation`): The Gym to run.
        server (`str`): Resources server, by its name in Gym.
        policy_url (`str`): OpenAI-compatible base URL of the policy, such as `http://127.0.0.1:8000/v1`.
        policy_name (`str`): Model name that Gym sends there.
        folder (`Path`): Receives Gym's configuration and log.
        tick (`Callable[[float], None]`, *optional*): Called while waiting with the seconds passed.

    Raises:
        RunError: From the function: the servers ended, or were not ready in time; the message ends with their log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head_port = free_port()
    environment = {
        "policy_base_url": policy_url,
        "policy_api_key": "none",
        "policy_model_name": policy_name,
        "skip_venv_if_present": True,
        "uv_venv_dir": str(installation.venv_links),
        "head_server": {"host": "127.0.0.1", "port": head_port},
    }
    (folder / "env.yaml").write_text(yaml.safe_dump(environment))
    log = folder / "gym.log"
    log.unlink(missing_ok=True)
    command = [str(installation.gym), "env", "start", "--resources-server", server]
    # The training kind records token ids and log-probabilities of what the policy generated.
    command += ["--model-type", "vllm_model/vllm_model_for_training"]
    command += ["+policy_model.responses_api_models.vllm_model.uses_reasoning_parser=false"]
    with Supervised(command, log=log, env=_environment(installation), cwd=folder, grace=_STOP_SECONDS) as process:

        def check() -> None:
            if process.exit_code() is not None:
                raise RunError(f"Gym's servers ended; the end of {log}:\n{process.tail()}", remedy="see the log")

        head = f"http://127.0.0.1:{head_port}"
        yield lambda: RunningGym(head, _wait_until_ready(head, check, tick, log), check)


def free_port() -> int:
    """Returns a TCP port on loopback that nothing listens on now.

    It lies above those that Gym gives its servers (10001 to 20000) and below those that systems give to connections, so
    that it stays free until it is used.

    Raises:
        RunError: A hundred ports in a row are taken.
    """
    for port in random.SystemRandom().sample(range(20001, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RunError("no free port between 20001 and 32767", remedy="end what listens there")


def _environment(installation: GymInstallation) -> dict[str, str]:
    path = os.pathsep.join([str(installation.gym.parent), str(uv_executable().parent), os.environ.get("PATH", "")])
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {
        "PATH": path,
        # Ray listens on more than loopback and would write its token into the home folder: a token for this run alone
        # keeps others out and leaves nothing behind.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # A cluster of its own, also where another one runs or has left its address behind.
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        # A proxy must not stand between servers on one machine.
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"])),
    }


def _wait_until_ready(
    head: str, check: Callable[[], None], tick: Callable[[float], None], log: Path
) -> tuple[ServerInstance, ...]:
    start = time.monotonic()
    while (passed := time.monotonic() - start) < _START_SECONDS:
        check()
        tick(passed)
        found = find_running(head)
        if found and found.servers and all(_answers(s.url) for s in found.servers):
            return found.servers
        time.sleep(0.5)
    raise RunError(f"Gym's servers were not ready after {_START_SECONDS:.0f} s", remedy=f"see {log}")


def _answers(url: str | None) -> bool:
    try:
        return url is not None and httpx.get(url, timeout=2.0, trust_env=False).status_code < 500
    except httpx.HTTPError:
        return False
