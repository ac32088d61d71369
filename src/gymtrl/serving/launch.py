"""The endpoint as a child process: started, awaited, watched, stopped."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import RunError, UserError
from gymtrl.processes import Supervised

_START_SECONDS = 600.0  # a large checkpoint on a slow disk


@dataclass(frozen=True)
class Endpoint:
    """A served checkpoint.

    Attributes:
        url (`str`): OpenAI-compatible base URL, `/v1` included.
        check (`Callable[[], None]`): Raises `RunError` when the endpoint has ended.
    """

    url: str
    check: Callable[[], None]


@contextmanager
def serving(
    model: Path,
    *,
    name: str,
    port: int,
    folder: Path,
    max_batch: int = 64,
    tick: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Endpoint]:
    """Serves a model folder on loopback for as long as the block lasts.

    Args:
        model (`Path`): Folder that transformers loads.
        name (`str`): Model name that requests must carry.
        port (`int`): TCP port.
        folder (`Path`): Receives the endpoint's log.
        max_batch (`int`, *optional*, defaults to `64`): Requests that are generated together.
        tick (`Callable[[float], None]`, *optional*): Called while waiting with the seconds passed.

    Raises:
        UserError: The model cannot be served.
        RunError: The port is in use, or the endpoint ended or was not ready in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, ready = folder / "endpoint.log", folder / "endpoint.json"
    log.unlink(missing_ok=True)
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gymtrl.serving", str(model), "--port", str(port)]
    command += ["--served-name", name, "--max-batch", str(max_batch), "--ready-file", str(ready)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Supervised(command, log=log, env=environment, grace=5.0) as process:

        def check() -> None:
            code = process.exit_code()
            if code is not None:
                failure = UserError if code == 2 else RunError
                raise failure(f"the endpoint for {model} ended:\n{process.tail()}", remedy=f"see {log}")

        start = time.monotonic()
        while not ready.exists():
            check()
            passed = time.monotonic() - start
            if passed > _START_SECONDS:
                raise RunError(f"the endpoint was not ready after {passed:.0f} s", remedy=f"see {log}")
            tick(passed)
            time.sleep(0.2)
        url = json.loads(ready.read_text())["url"]
        yield Endpoint(url if url.endswith("/v1") else f"{url}/v1", check)
