"""A worker that loads nothing: it sleeps, or dies, or writes how many met."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
task = (folder / "task").read_text()
rank = os.environ["RANK"]
if task == "meet":
    import torch

    torch.distributed.init_process_group("gloo")
    met = torch.ones(1)
    torch.distributed.all_reduce(met)
    (folder / f"met-{rank}").write_text(str(int(met)))
    torch.distributed.destroy_process_group()
else:
    (folder / f"started-{rank}").touch()
    while len(list(folder.glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)
    if task == "die" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
