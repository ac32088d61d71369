"""Starting Gym's servers on free ports, watching them, and stopping them with everything that they started."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import yaml

from gymtrl.errors import RunError, UserError
from gymtrl.gym.install import GymInstallation, uv_executable
from gymtrl.processes import Supervised
from gymtrl.text import plain

_START_SECONDS = 600.0  # Ray and the servers, all at once on a busy machine
_STOP_SECONDS = 30.0
_RESTARTS = 3
_RAY_TOO_SLOW = "node timed out during startup"  # Ray gives it 30 seconds
_KEY_VARIABLE = "GYMTRL_POLICY_KEY"
_LOGS = "servers"  # below the folder in which Gym runs


class GymDied(RunError):
    """A server of a Gym that we started has ended, and with it the rollouts under way.

    Args:
        what (`str`): What ended.
        log (`Path`): Its log, whose end the message shows.
    """

    def __init__(self, what: str, log: Path) -> None:
        super().__init__(f"{what}; the end of {log}:\n{_tail(log)}", remedy="see the log")
        self.what = what


class ServerInstance(msgspec.Struct, frozen=True):
    """One running server, as Gym's head server lists it.

    Attributes:
        process_name (`str`): Its name in Gym's configuration; an agent's name is what task rows refer to.
        server_type (`str`): `resources_servers`, `responses_api_agents`, `responses_api_models` and so on.
        url (`str`, *optional*): Where it answers.
        pid (`int`, *optional*): Its process.
    """

    process_name: str
    server_type: str
    url: str | None = None
    pid: int | None = None


@dataclass(frozen=True)
class OwnGym:
    """What a Gym that we started has beside its servers.

    Attributes:
        command (`Path`): Its `gym` command.
        folder (`Path`): Where it runs, and where its commands find its configuration.
        environment (`Mapping[str, str]`): Environment variables of its commands.
    """

    command: Path
    folder: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class RunningGym:
    """A Gym that answers.

    Attributes:
        head (`str`): URL of its head server.
        servers (`tuple[ServerInstance, ...]`): Its servers.
        check (`Callable[[], None]`): Raises `GymDied` when a server of ours has ended; does nothing for others' Gyms.
        own (`OwnGym`, *optional*): What we started; `None` for others' Gyms.
    """

    head: str
    servers: tuple[ServerInstance, ...]
    check: Callable[[], None] = lambda: None
    own: OwnGym | None = None

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
    servers: Sequence[str],
    policy_url: str,
    policy_name: str,
    folder: Path,
    policy_key: str = "none",
    tick: Callable[[str, float], None] = lambda doing, seconds: None,
) -> Iterator[Callable[[], RunningGym]]:
    """Starts Gym with its resources servers, their agents and the policy's model server, and stops it at the end.

    Yields a function that waits until everything answers, so that other things can start meanwhile. Called again it
    returns the same Gym, or one started anew where a server has ended since, three times at most. The endpoint behind
    `policy_url` may come up later and be replaced while Gym runs.

    Args:
        installation (`GymInstallation`): The Gym to run.
        servers (`Sequence[str]`): Resources servers, each by its name in Gym, or `name/flavor` for another of its
            configurations.
        policy_url (`str`): OpenAI-compatible base URL of the policy, such as `http://127.0.0.1:8000/v1`.
        policy_name (`str`): Model name that Gym sends there.
        folder (`Path`): Receives Gym's configuration and log, and a log of each server in `servers/`.
        policy_key (`str`, *optional*, defaults to `"none"`): Bearer token that Gym sends there.
        tick (`Callable[[str, float], None]`, *optional*): Called while waiting, with what for and the seconds passed.

    Raises:
        UserError: Gym has no such server.
        RunError: From the function: the servers ended, or were not ready in time; the message ends with their log.
    """
    command = [str(installation.gym), "env", "start"]
    for server in servers:
        command += ["--config", str(_configuration(installation, server))]
    # The training kind records token ids and log-probabilities of what the policy generated.
    command += ["--model-type", "vllm_model/vllm_model_for_training"]
    command += ["+policy_model.responses_api_models.vllm_model.uses_reasoning_parser=false"]
    settings = {
        "policy_base_url": policy_url,
        # Gym starts its servers with its configuration in their command lines, which everybody can read.
        "policy_api_key": f"${{oc.env:{_KEY_VARIABLE}}}",
        "policy_model_name": policy_name,
        "skip_venv_if_present": True,
        "uv_venv_dir": str(installation.venv_links),
        # Relative: Gym puts it into a command line as it is.
        "nemo_gym_log_dir": _LOGS,
    }
    (folder / _LOGS).mkdir(parents=True, exist_ok=True)
    for log in (folder / "gym.log", *(folder / _LOGS).glob("*.log")):
        log.unlink(missing_ok=True)
    environment = _environment(installation) | {_KEY_VARIABLE: policy_key}
    started = _StartedGym(OwnGym(installation.gym, folder, environment), command, settings, tick)
    started.start()
    try:
        yield started.ready
    finally:
        started.stop()


class _StartedGym:
    """Gym as a child process: awaited, watched, started again."""

    def __init__(
        self, own: OwnGym, command: Sequence[str], settings: dict[str, Any], tick: Callable[[str, float], None]
    ) -> None:
        self._own, self._command, self._settings, self._tick = own, command, settings, tick
        self._process: Supervised | None = None
        self._running: RunningGym | None = None
        self._restarts = 0
        self._doing = "starting Gym, seconds"

    def start(self) -> None:
        """Starts the servers on ports that are free now."""
        own, port = self._own, free_port()
        settings = self._settings | {"head_server": {"host": "127.0.0.1", "port": port}}
        (own.folder / "env.yaml").write_text(yaml.safe_dump(settings))
        self._head = f"http://127.0.0.1:{port}"
        log = own.folder / "gym.log"
        self._process = Supervised(self._command, log=log, env=own.environment, cwd=own.folder, grace=_STOP_SECONDS)

    def stop(self) -> None:
        """Ends all that was started."""
        if self._process is not None:
            self._process.stop()
        self._process = self._running = None

    def ready(self) -> RunningGym:
        """Waits until everything answers; starts everything again where a server has ended."""
        while True:
            try:
                if self._running is None:
                    self._wait()
                assert self._running is not None
                self._running.check()
                return self._running
            except GymDied as error:
                # What never ran is not mended by trying again, unless the machine was too busy for Ray to start.
                if self._running is None and not self._restarts and _RAY_TOO_SLOW not in error.message:
                    raise
                if self._restarts == _RESTARTS:
                    told = f"Gym was started again {_RESTARTS} times, and ended each time: {error.message}"
                    raise RunError(told, remedy=error.remedy) from None
                self._restarts += 1
                self._doing = f"starting Gym again ({error.what}), seconds"
                self._tick(self._doing, 0.0)
                self.stop()
                self.start()

    def _wait(self) -> None:
        start = time.monotonic()
        while (passed := time.monotonic() - start) < _START_SECONDS:
            found = find_running(self._head)
            servers = found.servers if found else ()
            self._check(servers)
            self._tick(self._doing, passed)
            if servers and all(_answers(s.url) for s in servers):
                self._running = RunningGym(self._head, servers, partial(self._check, servers, ready=True), self._own)
                return
            time.sleep(0.5)
        raise RunError(f"Gym's servers were not ready after {_START_SECONDS:.0f} s", remedy=f"see {self._own.folder}")

    def _check(self, servers: Sequence[ServerInstance], *, ready: bool = False) -> None:
        """Gym itself looks after its servers once a minute; this sees at once that one has ended."""
        ended = [s.process_name for s in servers if _has_ended(s.pid) or (ready and _refuses(s.url))]
        log = self._own.folder / _LOGS / f"{ended[0]}.log" if ended else self._own.folder / "gym.log"
        if ended or self._process is None or self._process.exit_code() is not None:
            raise GymDied(f"{', '.join(ended)} of Gym ended" if ended else "Gym's servers ended", log)


def _configuration(installation: GymInstallation, server: str) -> Path:
    """The configuration file of a resources server, from the folder where Gym keeps it."""
    name, _, flavor = server.partition("/")
    folder = installation.site_packages / "resources_servers" / name / "configs"
    path = folder / f"{flavor or name}.yaml"
    if path.parent != folder or not path.is_file():
        known = ", ".join(f"{name}/{p.stem}" for p in sorted(folder.glob("*.yaml")))
        remedy = f"known: {known}" if known else "see the folders of Gym's resources_servers"
        raise UserError(f"this Gym has no configuration for '{server}'", remedy=remedy)
    return path


def _tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log; what servers print may come from rollouts."""
    try:
        return plain("\n".join(log.read_text(errors="replace").splitlines()[-lines:]))
    except OSError:
        return ""


def _refuses(url: str | None) -> bool:
    """Whether nothing listens there any more; a busy server still takes connections."""
    if url is None:
        return False
    parts = httpx.URL(url)
    try:
        socket.create_connection((parts.host, parts.port or 80), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _has_ended(pid: int | None) -> bool:
    """Whether the process, a shell that Gym starts a server with, has ended; it may outlive the server."""
    try:
        return pid is not None and psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


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


def _answers(url: str | None) -> bool:
    try:
        return url is not None and httpx.get(url, timeout=2.0, trust_env=False).status_code < 500
    except httpx.HTTPError:
        return False
