"""What the processes of a run check and settle among themselves before they train.

Each of these mistakes would go unnoticed: training goes on, on fewer rows, with more memory, or in every process alone.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from gymtrl.errors import RunError
from gymtrl.training.launch import Engine


def require_processes(asked: int) -> None:
    """Checks that as many processes run as were asked for.

    Making TRL's configuration joins the processes, so this comes after it.

    Args:
        asked (`int`): All processes, over all nodes.

    Raises:
        RunError: Another number runs.
    """
    running = distributed.get_world_size() if distributed.is_initialized() else 1
    if running != asked:
        raise RunError(
            f"{asked} processes were asked for, and {running} run together",
            remedy="let 'gymtrl train' start them; for GPUs, check torch.cuda.is_available() on every node",
        )


def shard_on_cpu() -> None:
    """Lets accelerate shard a model in main memory, between making TRL's configuration and making its trainer.

    accelerate 1.15 knows FSDP for accelerators alone. On CPU it leaves its settings aside without a word, and each
    process keeps every weight. All that it lacks is to take the processes for such as may shard.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class RequireEngine(TrainerCallback):  # type: ignore[misc]  # transformers has no complete types
    """Stops training at its start where the processes do not share a model in the way that was asked for.

    That is so where an engine's settings were not taken up, and where `evaluate` was called before `train`: it marks
    the model as prepared, which leaves out the exchange of gradients.

    Args:
        trainer (`Trainer`): It is added to.
        engine (`str`): Of `Launch`.
        processes (`int`): All of them. One shares with nobody, whatever the engine.

    Raises:
        RunError: When training starts.
    """

    def __init__(self, trainer: Any, engine: Engine, processes: int) -> None:
        self.trainer = trainer
        self.asked = engine if processes > 1 else "none"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        running = "none"
        if self.trainer.is_fsdp_enabled:
            running = "fsdp2"
        elif self.trainer.is_deepspeed_enabled:
            running = "zero3"
        elif isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            running = "ddp"
        if running != self.asked:
            raise RunError(
                f"the processes were to share the model by {self.asked}, and do so by {running}",
                remedy="give no options of FSDP or DeepSpeed in the recipe's trl section: the engine sets them",
            )
