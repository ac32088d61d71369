"""A model folder behind a port: load, check, listen, stop."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from gymtrl.errors import RunError, UserError
from gymtrl.models.adapter import require_own_adapter, with_adapter
from gymtrl.serving.app import create_app
from gymtrl.serving.checkpoint import find_checkpoint
from gymtrl.serving.engine import Engine
from gymtrl.serving.suitability import refuse_unsuitable

HOST = "127.0.0.1"


def load_model(
    folder: Path, *, model: str | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a checkpoint for serving.

    Args:
        folder (`Path`): A model folder, an adapter folder, or a run folder with one of them. No code in it is run.
        model (`str`, *optional*): Folder or hub id of an adapter's model; by default the one that the adapter names.
        device (`str`, *optional*): Torch device. By default the GPU if there is one, else the CPU.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: The model in evaluation mode, in float32 on a CPU and in its
        own precision elsewhere, and its tokenizer. An adapter stays beside the weights: merged in 16 bits, it would
        answer otherwise than PEFT does.

    Raises:
        UserError: The folder holds no model that this server can serve right, or an adapter of another one.
    """
    checkpoint = find_checkpoint(folder, model=model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(checkpoint.model, trust_remote_code=False)
        refuse_unsuitable(config)
        if checkpoint.adapter is not None:
            require_own_adapter(checkpoint.adapter, checkpoint.model, config)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.tokenizer, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            checkpoint.model,
            trust_remote_code=False,
            dtype=torch.float32 if device == "cpu" else "auto",
        )
        if checkpoint.adapter is not None:
            loaded = _adapted(loaded, checkpoint.adapter)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder} cannot be loaded: {first_line}",
            remedy="give a folder that AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load",
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return loaded.to(device).eval(), tokenizer


def _adapted(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    adapted, astray = with_adapter(model, adapter)
    if astray:
        raise UserError(
            f"{len(astray)} weights of the adapter {adapter} are not those of its model, such as {min(astray)}",
            remedy="give the model that it was trained on with --model",
        )
    return adapted.get_base_model()


def serve(
    folder: Path,
    *,
    model: str | None = None,
    port: int = 0,
    served_name: str | None = None,
    max_batch: int = 64,
    threads: int | None = None,
    device: str | None = None,
    ready_file: Path | None = None,
) -> None:
    """Serves a checkpoint on loopback until SIGTERM or SIGINT; requests still running then get status 503.

    There is no authentication, hence no other address than 127.0.0.1.

    Args:
        folder (`Path`): A model folder, an adapter folder, or a run folder with one of them.
        model (`str`, *optional*): Folder or hub id of an adapter's model; by default the one that the adapter names.
        port (`int`, *optional*, defaults to 0): Port; 0 picks a free one.
        served_name (`str`, *optional*): The model's name in requests. The folder's name by default.
        max_batch (`int`, *optional*, defaults to 64): Requests generated together at most.
        threads (`int`, *optional*): CPU threads for torch. Its own choice by default.
        device (`str`, *optional*): Torch device. By default the GPU if there is one, else the CPU.
        ready_file (`Path`, *optional*): Written when the model answers: JSON with `url`, `pid` and `model`. Removed
            at the end.

    Raises:
        UserError: The folder cannot be served, or the port is none.
        RunError: The port cannot be listened on.
    """
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    # Only the engine's thread may share its work with others: where two threads do, OpenMP (libgomp) takes the cores
    # for overbooked and lets its workers sleep between the parts of a pass, which then takes half as long again.
    threads = torch.get_num_threads() if threads is None else threads
    torch.set_num_threads(1)
    # Before the model, which takes long to load; who connects early waits until then.
    with _listening(port) as listener:
        loaded, tokenizer = load_model(folder, model=model, device=device)
        engine = Engine(loaded, tokenizer, max_batch=max_batch, threads=threads)
        name = served_name or folder.resolve().name
        ready = {
            "url": f"http://{HOST}:{listener.getsockname()[1]}",
            "pid": os.getpid(),
            "model": name,
        }
        config = uvicorn.Config(
            create_app(engine, name),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            # Idle connections of a client's pool live longer than its pauses between turns.
            timeout_keep_alive=300,
        )
        try:
            _Server(config, engine, ready, ready_file).run(sockets=[listener])
        finally:
            engine.close(timeout=0.5)
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Says when it listens, and fails running requests when it is told to stop, so that it need not wait for them."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: dict[str, Any], ready_file: Path | None) -> None:
        super().__init__(config)
        self.engine, self.ready, self.ready_file = engine, ready, ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"serving {self.ready['model']} at {self.ready['url']}/v1", flush=True)
        if self.ready_file is not None:
            partial = self.ready_file.with_name(f".{self.ready_file.name}.{os.getpid()}")
            partial.write_text(json.dumps(self.ready) + "\n")
            os.replace(partial, self.ready_file)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Without uvicorn's own handler, which raises the signal again at the end: a stop asked for is a clean exit.
        self.should_exit = True
        self.engine.close(timeout=0)


def _listening(port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UserError(f"{port} is no port", remedy="give a number from 0 (picks a free one) to 65535")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        # At once: with SO_REUSEADDR a port that is bound and not listened on can be bound by another process too.
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise RunError(
            f"cannot listen on {HOST}:{port}: {error.strerror}",
            remedy="stop what uses that port, or give another one (0 picks a free one)",
        ) from error
    return listener
