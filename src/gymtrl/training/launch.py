"""How the processes of a run are started: one, several on this machine, or several on each of many nodes.

Several are torchrun's, which gives every process its rank and ends all when one of them fails. Nothing of ours starts
processes through `accelerate launch`: told to use two on CPU, it silently runs one.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from gymtrl.errors import UserError

Engine = Literal["ddp", "fsdp2", "zero3"]

WORKER = "gymtrl.training.worker"
"""Module that every process runs, with the job folder as its argument."""

_FOREIGN = re.compile(
    r"(ACCELERATE|FSDP|TORCHELASTIC|PMI|PMIX|OMPI_COMM_WORLD|MV2_COMM_WORLD)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
    r"|MASTER_(ADDR|PORT)"
)
"""Variables by which another launcher would decide how many processes a worker believes in, or what they share."""

_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",  # checkpoints that from_pretrained loads
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # no process holds all weights on its GPU, not even for a moment
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
_ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
_ENGINES: dict[Engine, dict[str, str]] = {"ddp": {}, "fsdp2": _FSDP2, "zero3": _ZERO3}


@dataclass(frozen=True)
class Launch:
    """The processes of a run.

    Attributes:
        processes (`int`): All of them, over all nodes: a multiple of `nodes`.
        cuda (`bool`): Each has a GPU of its own, with NCCL between them; else they share the CPU, with gloo.
        nodes (`int`, *optional*, defaults to `1`): Machines of a Slurm job. With several, `host` is one of them.
        engine (`str`, *optional*, defaults to `"ddp"`): What several processes share: `ddp` keeps every weight in each,
            `fsdp2` and `zero3` (DeepSpeed) divide weights, gradients and optimizer among them.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Where the processes of several nodes meet.
        port (`int`, *optional*, defaults to `29500`): TCP port there. On one node any free port is taken.

    Raises:
        UserError: The nodes would not get equally many processes, or the engine needs GPUs.
    """

    processes: int
    cuda: bool
    nodes: int = 1
    engine: Engine = "ddp"
    host: str = "127.0.0.1"
    port: int = 29500

    def __post_init__(self) -> None:
        if self.processes < 1 or self.nodes < 1 or self.processes % self.nodes:
            raise UserError(
                f"{self.processes} processes cannot be divided among {self.nodes} nodes",
                remedy="ask for as many on each node",
            )
        if self.engine == "zero3" and not self.cuda:
            raise UserError("ZeRO-3 needs GPUs", remedy="choose the engine ddp or fsdp2")

    @property
    def per_node(self) -> int:
        """Processes on each node."""
        return self.processes // self.nodes


def worker_command(job_folder: Path, launch: Launch, *, module: str = WORKER) -> list[str]:
    """The command that trains.

    Args:
        job_folder (`Path`): Holds `job.json`; with several nodes, on a disk that all of them see.
        launch (`Launch`): The processes.
        module (`str`, *optional*): What each of them runs; the worker unless given.

    Returns:
        `list[str]`: Program and arguments, for `Supervised`; no shell reads them. With several nodes it starts with
            `srun`, and only works inside a Slurm job.
    """
    program = ["-m", module, str(job_folder)]
    if launch.processes == 1:
        return [sys.executable, *program]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.per_node), "--max-restarts", "0"]
    if launch.nodes == 1:
        return [*torchrun, "--standalone", "--local-addr", "127.0.0.1", *program]
    # A name of its own for every attempt, so that what is left of one before is never taken for a part of it.
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{launch.host}:{launch.port}"]
    meeting += ["--rdzv-id", uuid.uuid4().hex]
    # Without --quit-on-interrupt, srun answers the first SIGINT with a report and goes on.
    srun = ["srun", f"--nodes={launch.nodes}", f"--ntasks={launch.nodes}", "--ntasks-per-node=1"]
    return [*srun, "--kill-on-bad-exit=1", "--quit-on-interrupt", *torchrun, *meeting, *program]


def require_engine(launch: Launch) -> None:
    """Checks that what an engine needs is installed.

    Raises:
        UserError: DeepSpeed is not, and the engine is its.
    """
    if launch.engine == "zero3" and find_spec("deepspeed") is None:
        raise UserError("the engine zero3 needs DeepSpeed", remedy="pip install deepspeed, or choose fsdp2")


def worker_environment(launch: Launch) -> dict[str, str]:
    """The environment of the worker: ours, without what another launcher left in it, with what the processes need.

    Args:
        launch (`Launch`): The processes.

    Returns:
        `dict[str, str]`: The whole environment. Each process gets its share of our threads.

    Raises:
        UserError: DeepSpeed is not installed, and the engine is its.
    """
    require_engine(launch)
    made = {name: value for name, value in os.environ.items() if not _FOREIGN.fullmatch(name)}
    made["PYTHONSAFEPATH"] = "1"  # what lies in the working folder is no module of ours
    if launch.processes == 1:
        if launch.cuda:
            # Where one process sees several GPUs, transformers copies the model to all of them, which TRL refuses.
            made["CUDA_VISIBLE_DEVICES"] = made.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return made
    # OpenMP takes a list, too: a number for each level of nesting.
    asked = made.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    threads = int(asked) if asked.isdecimal() else len(os.sched_getaffinity(0))
    made |= {"OMP_NUM_THREADS": str(max(1, threads // launch.per_node))}
    if not launch.cuda:
        made |= {"ACCELERATE_USE_CPU": "true"}
        if launch.nodes == 1 and sys.platform == "linux":
            made |= {"GLOO_SOCKET_IFNAME": "lo"}
    return made | _ENGINES[launch.engine]
