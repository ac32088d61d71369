"""A Gym that stays up while the policy behind it changes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gymtrl.errors import UserError
from gymtrl.gym.agents import Row
from gymtrl.gym.collect import Collection, collect, finished
from gymtrl.gym.install import require_installation
from gymtrl.gym.servers import RunningGym, find_running, free_port, running_gym
from gymtrl.gym.settings import CollectSettings
from gymtrl.serving.hosted import Hosted
from gymtrl.serving.launch import Endpoint, serving
from gymtrl.serving.settings import ServingSettings

_SERVED = ServingSettings()

Progress = Callable[[str, int, int], None]
"""Receives a stage's name, how much of it is done, and how much there is (0 where nobody knows)."""


def silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


@dataclass
class GymSession:
    """A Gym that stays up while the policy behind it changes.

    Attributes:
        servers (`tuple[str, ...]`): Gym's resources servers.
        port (`int`): Port on which the policy is served.
        endpoint_name (`str`): Model name that the endpoint answers to.
        folder (`Path`): Receives logs.
        progress (`Progress`): Told about waiting and collecting.
    """

    servers: tuple[str, ...]
    port: int
    folder: Path
    gym_home: Path | None = None
    head: str | None = None
    endpoint_name: str = "policy"
    progress: Progress = silent
    _stack: ExitStack = field(default_factory=ExitStack)
    _gym: Callable[[], RunningGym] | None = None
    _key: str = field(default_factory=partial(secrets.token_hex, 16), init=False, repr=False)

    def collect(
        self,
        model: Path | Hosted,
        tasks: list[Row],
        out: Path,
        settings: CollectSettings,
        *,
        name: str,
        served: ServingSettings = _SERVED,
        like: Path | None = None,
    ) -> Collection:
        """Serves `model` and collects its rollouts; both end when the last rollout is in.

        Gym is started at the first call and is up as long as the session. A hosted model is reached through a relay at
        the session's own port. With `like`, rollouts of another model, the same has to serve both.
        """
        done = finished(tasks, out, settings)
        if done is not None:
            return done
        gym = self._starting()
        with self._serving(model, settings, served) as endpoint:
            _require_one_server(out, endpoint.server, like)
            out.parent.mkdir(parents=True, exist_ok=True)
            _served_by_file(out).write_text(endpoint.server)
            return collect(
                gym,
                tasks,
                out,
                settings,
                check=endpoint.check,
                progress=lambda done, total: self.progress(name, done, total),
            )

    def _serving(
        self, model: Path | Hosted, settings: CollectSettings, served: ServingSettings
    ) -> AbstractContextManager[Endpoint]:
        if isinstance(model, Hosted):
            from gymtrl.serving.relay import relaying

            return relaying(
                model,
                name=self.endpoint_name,
                port=self.port,
                max_output_tokens=settings.max_output_tokens,
                key=self._key if self.head is None else None,
            )
        return serving(
            model,
            name=self.endpoint_name,
            port=self.port,
            logs=self.folder,
            max_batch=settings.concurrency,
            backend=served.backend,
            vllm=served.vllm,
            tick=lambda server, seconds: self.progress(f"loading the model into {server}, seconds", int(seconds), 0),
        )

    def _starting(self) -> Callable[[], RunningGym]:
        """Returns a function that waits for Gym, which starts while the model is loaded."""
        if self._gym is None and self.head is not None:
            found = find_running(self.head)
            if found is None:
                raise UserError(f"no Gym answers at {self.head}", remedy="start it, or leave --head out")
            self._gym = lambda: found
        if self._gym is None:
            self._gym = self._stack.enter_context(
                running_gym(
                    require_installation(self.gym_home, self.servers),
                    servers=self.servers,
                    policy_url=f"http://127.0.0.1:{self.port}/v1",
                    policy_name=self.endpoint_name,
                    policy_key=self._key,
                    folder=self.folder,
                    tick=lambda doing, seconds: self.progress(doing, int(seconds), 0),
                )
            )
        return self._gym


def served_by(rollouts: Path) -> str:
    """Returns what served the model whose rollouts these are, in words; `""` where nothing tells."""
    try:
        return _served_by_file(rollouts).read_text()
    except FileNotFoundError:
        return ""


def _served_by_file(rollouts: Path) -> Path:
    return rollouts.with_name(f"{rollouts.stem}_served_by.txt")


def _require_one_server(out: Path, server: str, like: Path | None) -> None:
    """Two servers sample alike, but do not compute alike: a difference of theirs would be taken for the models'."""
    begun = [path for path in (out, like) if path is not None and path.exists() and path.stat().st_size]
    for other in filter(None, map(served_by, begun)):
        if other != server:
            raise UserError(
                f"{other} served the rollouts that are there already, and {server} would serve the others",
                remedy="have the same serve both with --backend and --vllm, or begin anew in another folder with -o",
            )


@contextmanager
def gym_session(
    servers: str | Sequence[str],
    folder: Path,
    *,
    gym_home: Path | None = None,
    head: str | None = None,
    port: int | None = None,
    endpoint_name: str = "policy",
    progress: Progress = silent,
) -> Iterator[GymSession]:
    """Opens a session; at its end everything that it started is stopped.

    Args:
        servers (`str` or `Sequence[str]`): Gym's resources servers; tasks choose among them by their agents.
        folder (`Path`): Receives logs and Gym's configuration.
        gym_home (`Path`, *optional*): Where Gym is installed.
        head (`str`, *optional*): URL of a running Gym's head server, used instead of an own one.
        port (`int`, *optional*): Port of the endpoint; a free one by default. A Gym that runs already knows its own.
        endpoint_name (`str`, *optional*, defaults to `"policy"`): Model name that the endpoint answers to.
        progress (`Progress`, *optional*): Told about waiting and collecting.

    Raises:
        UserError: Gym is not installed and none runs, or a running one is named without the endpoint's port.
    """
    servers = (servers,) if isinstance(servers, str) else tuple(servers)
    if head is None:
        require_installation(gym_home, servers)
    elif port is None:
        raise UserError(
            "a running Gym asks the policy at an address of its own",
            remedy="give --endpoint-port (of its policy_base_url) and --endpoint-name (its policy_model_name)",
        )
    with ExitStack() as stack:
        yield GymSession(servers, port or free_port(), folder, gym_home, head, endpoint_name, progress, stack)
