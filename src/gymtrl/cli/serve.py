"""`gymtrl serve`"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import default_out
from gymtrl.serving.settings import Backend


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("serve")(serve)


def serve(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a model, of an adapter, or that 'train' wrote.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The adapter's model, if not where the adapter says.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    served_name: Annotated[
        str | None, typer.Option("--served-name", help="Name of the model in requests; the folder's if not given.")
    ] = None,
    backend: Annotated[
        Backend, typer.Option("--backend", help="What serves: vLLM, the light endpoint, or vLLM where it is found.")
    ] = "auto",
    vllm: Annotated[
        Path | None, typer.Option("--vllm", help="vLLM's command in its own environment, if not on PATH.")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests generated together at most.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the log; 'served' beside the checkpoint if not given."),
    ] = None,
) -> None:
    """Serve a checkpoint on loopback, OpenAI-compatible, until Ctrl-C."""
    from gymtrl.reports.progress import watch
    from gymtrl.serving.launch import serving
    from gymtrl.text import plain

    logs = out or default_out([checkpoint], "served")
    name = served_name or checkpoint.resolve().name
    with ExitStack() as stack:
        with watch() as progress:
            served = serving(
                checkpoint,
                name=name,
                port=port,
                logs=logs,
                model=model,
                max_batch=max_batch,
                backend=backend,
                vllm=vllm,
                tick=lambda server, seconds: progress(f"loading the model into {server}, seconds", int(seconds), 0),
            )
            endpoint = stack.enter_context(served)
        print(plain(f"serving {name} at {endpoint.url} with {endpoint.server}; Ctrl-C stops it"), flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                endpoint.check()
                time.sleep(1)
