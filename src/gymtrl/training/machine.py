"""What there is to train on: memory that may really be used, cores and GPUs.

Run as: python -m gymtrl.training.machine, which prints the GPUs as JSON
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from gymtrl.errors import RunError

ADDRESS_SPACE = 1800 * 2**20
"""Measured: what a process maps and does not touch once torch and TRL are imported; a limit of the address space,
`ulimit -v`, counts it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name (`str`): As its driver calls it.
        total, free (`int`): Bytes of its memory.
        bfloat16 (`bool`): It computes in bfloat16.
    """

    name: str
    total: int
    free: int
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Attributes:
        memory (`int`): Bytes of main memory that are available, within the limits of the container and the shell.
        limit (`str`): What sets `memory`: `"memory"`, `"container"` or `"ulimit -v"`.
        cores (`int`): Processor cores that this process may run on.
        gpus (`tuple[Gpu, ...]`): Visible GPUs; empty where they were not asked for.
    """

    memory: int
    limit: str
    cores: int
    gpus: tuple[Gpu, ...] = ()


def machine(*, gpus: bool = False) -> Machine:
    """Looks at this machine.

    Args:
        gpus (`bool`): Look for GPUs, too, which imports torch.
    """
    import psutil

    limits = {"memory": psutil.virtual_memory().available}
    container = container_memory()
    if container is not None:
        limits["container"] = container
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits["ulimit -v"] = max(0, soft - ADDRESS_SPACE)
    limit = min(limits, key=limits.__getitem__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(limits[limit], limit, cores, _gpus() if gpus else ())


def container_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Memory that this process's control groups leave it, page cache that can be dropped included.

    The limit of every group from the process's own up to the root holds, so the tightest counts.

    Args:
        cgroups (`Path`): Where the control groups are mounted.
        own (`Path`): File that names the groups of the process, as proc(5) and cgroups(7) describe it.

    Returns:
        `int`, *optional*: Bytes; `None` where nothing is limited.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    left: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # Within a container the path may be that of the host; its own group is then mounted at the root.
        for folder in (root / group, *(root / parent for parent in group.parents)):
            free = _left(folder, *files)
            if free is not None:
                left.append(free)
    return min(left) if left else None


def _left(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return None
    if most >= 2**60:  # version 1 has no word for none
        return None
    return max(0, most - used + int(stat.get(droppable, 0)))


def _gpus() -> tuple[Gpu, ...]:
    """Asks in a process of its own: who asks for free memory holds some of each GPU from then on."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    command = [sys.executable, "-P", "-m", "gymtrl.training.machine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RunError(
            f"the GPUs cannot be asked for their memory: {told[-1]}",
            remedy="see what nvidia-smi says, or train on the CPU with CUDA_VISIBLE_DEVICES=''",
        )
    return tuple(Gpu(**gpu) for gpu in json.loads(done.stdout.splitlines()[-1]))


def _asked() -> list[Gpu]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free, bfloat16=capability >= (8, 0)))
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(gpu) for gpu in _asked()]))
