"""A checkpoint behind an endpoint in processes of its own: started, awaited, warmed up, watched, stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from gymtrl.errors import RunError, UserError
from gymtrl.processes import Supervised
from gymtrl.serving.checkpoint import Checkpoint, find_checkpoint
from gymtrl.serving.settings import Backend
from gymtrl.serving.vllm import Vllm, find_vllm, vllm_command, vllm_environment

_START_SECONDS = 900.0  # a large checkpoint on a slow disk; vLLM compiles besides
_WARM_SECONDS = 300.0
_HEALTH_SECONDS = 10.0  # between two questions


@dataclass(frozen=True)
class Endpoint:
    """A served checkpoint.

    Attributes:
        url (`str`): OpenAI-compatible base URL, `/v1` included.
        server (`str`): What serves it, in words.
        check (`Callable[[], None]`): Raises `RunError` when the endpoint has ended or can generate no more.
    """

    url: str
    server: str
    check: Callable[[], None]


@contextmanager
def serving(
    folder: Path,
    *,
    name: str,
    port: int,
    logs: Path,
    model: str | None = None,
    max_batch: int = 64,
    backend: Backend = "auto",
    vllm: Path | None = None,
    tick: Callable[[str, float], None] = lambda server, seconds: None,
) -> Iterator[Endpoint]:
    """Serves a checkpoint on loopback for as long as the block lasts.

    Args:
        folder (`Path`): A model folder, an adapter folder, or a run folder with one of them.
        name (`str`): Model name that requests must carry.
        port (`int`): TCP port.
        logs (`Path`): Folder that receives the endpoint's log.
        model (`str`, *optional*): Folder or hub id of an adapter's model; by default the one that the adapter names.
        max_batch (`int`, *optional*, defaults to `64`): Requests that are generated together.
        backend (`"auto"`, `"light"` or `"vllm"`, *optional*, defaults to `"auto"`): What serves; by default vLLM where
            its command is found, else the light endpoint.
        vllm (`Path`, *optional*): vLLM's command; by default the one on PATH.
        tick (`Callable[[str, float], None]`, *optional*): Called while waiting with what serves, in words, and the
            seconds passed.

    Raises:
        UserError: The checkpoint cannot be served, or vLLM is asked for and not there.
        RunError: The port is in use, or the endpoint ended or was not ready in time.
    """
    checkpoint = find_checkpoint(folder, model=model)
    found = _chosen(backend, vllm)
    require_free(port)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "endpoint.log"
    log.unlink(missing_ok=True)
    if found is None:
        server = "the light endpoint"
        command = [sys.executable, "-m", "gymtrl.serving", str(folder), "--port", str(port)]
        command += ["--served-name", name, "--max-batch", str(max_batch)]
        command += [] if model is None else ["--model", model]
        environment: Mapping[str, str] = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    else:
        server = f"vLLM {found.version}".strip() + (" for CPUs" if found.cpu else "")
        parser = _tool_parser(checkpoint)
        command = vllm_command(found, checkpoint, name=name, port=port, max_batch=max_batch, parser=parser)
        environment = vllm_environment(found)
    url = f"http://127.0.0.1:{port}/v1"
    with Supervised(command, log=log, env=environment, grace=5.0 if found is None else 20.0) as process:

        def check() -> None:
            code = process.exit_code()
            if code is not None:
                failure = UserError if code == 2 and found is None else RunError
                raise failure(f"{server} for {folder} ended:\n{process.tail()}", remedy=f"see {log}")

        start = time.monotonic()
        while not _serves(url, name):
            check()
            passed = time.monotonic() - start
            if passed > _START_SECONDS:
                raise RunError(f"{server} was not ready after {passed:.0f} s", remedy=f"see {log}")
            tick(server, passed)
            time.sleep(0.2)
        _warm_up(url, name, log)
        asked = time.monotonic()

        def check_health() -> None:
            nonlocal asked
            check()
            if time.monotonic() - asked > _HEALTH_SECONDS:
                asked = time.monotonic()
                _require_health(url, log)

        yield Endpoint(url, server, check_health)


def _chosen(backend: Backend, command: Path | None) -> Vllm | None:
    """The vLLM that is to serve, `None` for the light endpoint."""
    if backend == "light":
        return None
    found = find_vllm(command)
    if found is None and backend == "vllm":
        raise UserError(
            "there is no vllm on PATH",
            remedy="name the command of vLLM's own environment with --vllm, or take --backend light",
        )
    return found


def _tool_parser(checkpoint: Checkpoint) -> str | None:
    """vLLM's parser for the tool calls that the model's template writes."""
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.serving.chat import call_family

    family = call_family(load_tokenizer(checkpoint.tokenizer))
    return None if family is None else family.name


def require_free(port: int) -> None:
    """Checks before the long start that nobody else answers there: it would be taken for ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise RunError(f"cannot listen on 127.0.0.1:{port}: {error}", remedy="give another port") from error


def _serves(url: str, name: str) -> bool:
    """Whether the endpoint answers, and with this model."""
    with contextlib.suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
        # Not through a proxy, and without waiting for a model that is being loaded.
        answer = httpx.get(f"{url}/models", timeout=2.0, trust_env=False)
        return answer.is_success and name in {model["id"] for model in answer.json()["data"]}
    return False


def _warm_up(url: str, name: str, log: Path) -> None:
    """Generates one token, so that what breaks at the first request breaks here, and nobody's first one is slow."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    try:
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=_WARM_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        raise RunError(f"the endpoint does not answer its first request: {error!r}", remedy=f"see {log}") from error
    # A template may refuse this chat and take those of the tasks; that is no failure of the endpoint.
    if answer.status_code >= 500:
        raise RunError(f"the endpoint fails at its first request: {answer.text[:500]}", remedy=f"see {log}")


def _require_health(url: str, log: Path) -> None:
    try:
        answer = httpx.get(f"{url.removesuffix('/v1')}/health", timeout=2.0, trust_env=False)
    except httpx.HTTPError:
        return  # busy; whether it runs at all is known
    if answer.status_code >= 500:
        raise RunError(f"the endpoint can generate no more: {answer.text[:500]}", remedy=f"see {log}")
