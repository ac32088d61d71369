"""Choosing what the user left open, so that a run fits into memory, and saying what was traded for what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gymtrl.errors import UserError
from gymtrl.training.launch import Engine
from gymtrl.training.machine import Gpu, Machine
from gymtrl.training.memory import MemoryEstimate, Method, ModelShape, Objective, RunShape, estimate

Dtype = Literal["float32", "bfloat16"]

SHORTEST = 64
"""Tokens; rows shorter than this are no remedy."""

SHARE = 0.9
"""Of what is available, an estimate may take so much: benchmarks/plan.py keeps the errors."""

PROCESS_BYTES = {"cpu": 500 * 2**20, "cuda": 700 * 2**20}
"""Measured on CPU: Python with torch, transformers, datasets, PEFT and TRL imported. On a GPU, not measured: what CUDA
holds for itself."""

LARGEST_MICRO_BATCH = 8
"""On a GPU; beyond that little speed is gained."""

UNCHECKPOINTED_MICRO_BATCH = 4
"""On a GPU, as many rows without gradient checkpointing are preferred to more rows with it."""


@dataclass(frozen=True)
class FitRequest:
    """A run as far as its memory goes; what is `None` is open.

    Attributes:
        model (`ModelShape`): What is trained.
        objective (`str`): `"sft"`, `"dpo"`, `"kto"` or `"grpo"`.
        method (`str`): `"lora"`, `"qlora"` or `"full"`; it is never changed.
        longest (`int`): Tokens of the longest sequence; for pairs, of the longest prompt with one side.
        effective_batch (`int`): Rows of an optimizer step, over all processes.
        cuda (`bool`): Train on the first GPUs.
        autocast (`bool`): They compute in bfloat16.
        processes (`int`): Each has a GPU of its own, or its share of its node's main memory.
        nodes (`int`): Machines that they are divided among, all like this one.
        engine (`str`): What they share, as `Launch` has it.
        lora_r (`int`): Rank of the adapter.
        micro_batch (`int`, *optional*): Rows at once.
        gradient_checkpointing (`bool`, *optional*): Compute activations again.
        dtype (`str`, *optional*): Type of the weights held, `"float32"` or `"bfloat16"`.
        least_micro (`int`): Fewest rows at once.
    """

    model: ModelShape
    objective: Objective
    method: Method
    longest: int
    effective_batch: int
    cuda: bool
    autocast: bool = True
    processes: int = 1
    nodes: int = 1
    engine: Engine = "ddp"
    lora_r: int = 32
    micro_batch: int | None = None
    gradient_checkpointing: bool | None = None
    dtype: Dtype | None = None
    least_micro: int = 1

    @property
    def per_node(self) -> int:
        """Processes on each node."""
        return -(-self.processes // self.nodes)


@dataclass(frozen=True)
class Fitted:
    """Settings that fit.

    Attributes:
        micro_batch, accumulation (`int`): Rows at once in a process, and how often before a step.
        gradient_checkpointing (`bool`): Compute activations again.
        dtype (`str`): Type of the weights held.
        memory (`MemoryEstimate`): Of each process, beyond Python and its libraries.
        available (`int`): Bytes that the estimate had to stay within.
        traded (`tuple[str, ...]`): What was given up for what, in sentences.
    """

    micro_batch: int
    accumulation: int
    gradient_checkpointing: bool
    dtype: Dtype
    memory: MemoryEstimate
    available: int
    traded: tuple[str, ...]


def fit(request: FitRequest, machine: Machine) -> Fitted:
    """Chooses micro-batch, accumulation, gradient checkpointing and precision; what was set stays as it is.

    The effective batch stays, so the loss does not depend on the choice. On CPU one row at a time is fastest. On a GPU
    as many as fit are taken, up to eight.

    Args:
        request (`FitRequest`): The run.
        machine (`Machine`): Where it shall run, with its GPUs where one is used.

    Raises:
        UserError: Nothing fits; the remedy names what would.
    """
    if request.micro_batch is not None and request.micro_batch < request.least_micro:
        raise UserError(
            f"micro_batch is {request.micro_batch}, and {request.objective} takes {request.least_micro} rows at once "
            "at the least: it compares them with each other",
            remedy=f"leave micro_batch unset, or set it to {request.least_micro} or more",
        )
    available = available_memory(request, machine)
    dtype = request.dtype or _dtype(request)
    runs = _candidates(request, dtype)
    if not runs:
        rows = "" if request.micro_batch is None else f"micro_batch {request.micro_batch} on "
        raise UserError(
            f"effective_batch {request.effective_batch} cannot be divided: {rows}{request.processes} process(es)",
            remedy="leave micro_batch unset, or make effective_batch a multiple of micro_batch times processes",
        )
    for run in runs:
        memory = estimate(request.model, run)
        if memory.total <= available:
            return Fitted(
                micro_batch=run.micro_batch,
                accumulation=run.accumulation,
                gradient_checkpointing=run.gradient_checkpointing,
                dtype=dtype,
                memory=memory,
                available=available,
                traded=_traded(request, runs[0], run),
            )
    least = min(estimate(request.model, run).total for run in runs)
    limit = min(own_gpus(request, machine), key=_free).name if request.cuda else machine.limit
    raise UserError(
        f"training needs {size(least)} of memory at the least, and {size(available)} can be used ({limit})",
        remedy=_remedy(request, dtype, available),
    )


def available_memory(request: FitRequest, machine: Machine) -> int:
    """Bytes that the estimate of one process has to stay within.

    Args:
        request (`FitRequest`): The run.
        machine (`Machine`): Where it shall run.

    Raises:
        UserError: A GPU is wanted and there is none.
    """
    if not request.cuda:
        return max(0, round(SHARE * machine.memory / request.per_node) - PROCESS_BYTES["cpu"])
    return max(0, round(SHARE * min(map(_free, own_gpus(request, machine)))) - PROCESS_BYTES["cuda"])


def own_gpus(request: FitRequest, machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs of a node that the run takes: the first, one a process.

    Args:
        request (`FitRequest`): The run.
        machine (`Machine`): The node.

    Raises:
        UserError: There are too few.
    """
    if not machine.gpus:
        raise UserError("no GPU was found", remedy="train on the CPU")
    if request.per_node > len(machine.gpus):
        raise UserError(
            f"{request.per_node} processes on a node with {len(machine.gpus)} GPU(s): each needs one of its own",
            remedy=f"set nproc to {len(machine.gpus) * request.nodes}",
        )
    return machine.gpus[: request.per_node]


def longest_that_fits(request: FitRequest, available: int, dtype: Dtype) -> int:
    """Tokens of the longest sequence with which the most frugal choice fits; 0 where not even one token does.

    Args:
        request (`FitRequest`): The run; its own `longest` is the most that is looked at.
        available (`int`): Bytes.
        dtype (`str`): Type of the weights held.
    """
    runs = _candidates(request, dtype)

    def fits(tokens: int) -> bool:
        return any(estimate(request.model, replace(run, longest=tokens)).total <= available for run in runs)

    low, high = 0, request.longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _candidates(request: FitRequest, dtype: Dtype) -> list[RunShape]:
    """Every choice that the request leaves, the preferred first."""
    share, rest = divmod(request.effective_batch, request.processes)
    if rest:
        return []
    divisors = [rows for rows in range(request.least_micro, share + 1) if share % rows == 0]
    if request.micro_batch is not None:
        rows_at_once = [rows for rows in divisors if rows == request.micro_batch]
    elif request.cuda:
        rows_at_once = [rows for rows in divisors if rows <= max(LARGEST_MICRO_BATCH, divisors[0])][::-1]
    else:
        rows_at_once = divisors[:1]
    wanted = min(rows_at_once[0], UNCHECKPOINTED_MICRO_BATCH) if rows_at_once else 0
    if request.gradient_checkpointing is not None:
        order = [(rows, request.gradient_checkpointing) for rows in rows_at_once]
    else:
        order = [(rows, False) for rows in rows_at_once if rows >= wanted]
        order += [(rows, True) for rows in rows_at_once]
    return [
        RunShape(
            objective=request.objective,
            method=request.method,
            longest=request.longest,
            micro_batch=rows,
            accumulation=share // rows,
            gradient_checkpointing=checkpointing,
            lora_r=request.lora_r,
            weight_bytes=2 if dtype == "bfloat16" else 4,
            cuda=request.cuda,
            autocast=request.autocast,
            engine=request.engine,
            processes=request.processes,
        )
        for rows, checkpointing in order
    ]


def _dtype(request: FitRequest) -> Dtype:
    """Frozen weights lose nothing by rounding on a GPU; trained ones would, and CPUs compute slowly in bfloat16."""
    return "bfloat16" if request.cuda and request.autocast and request.method != "full" else "float32"


def _free(gpu: Gpu) -> int:
    return gpu.free


def _traded(request: FitRequest, preferred: RunShape, chosen: RunShape) -> tuple[str, ...]:
    """Compares what was chosen with what it stands in for, one difference at a time."""

    def saved(other: RunShape) -> str:
        return size(estimate(request.model, other).total - estimate(request.model, chosen).total)

    said = []
    if chosen.gradient_checkpointing and request.gradient_checkpointing is None:
        without = saved(replace(chosen, gradient_checkpointing=False))
        said.append(f"gradient checkpointing on: saves {without}, costs about a fifth of the speed")
    if chosen.micro_batch < preferred.micro_batch:
        larger = replace(chosen, micro_batch=preferred.micro_batch, accumulation=preferred.accumulation)
        said.append(
            f"{chosen.micro_batch} rows at once in place of {preferred.micro_batch}: saves {saved(larger)}, costs some "
            f"speed; {chosen.accumulation} micro-batches a step keep the effective batch, and so the loss"
        )
    if chosen.weight_bytes == 2 and request.dtype is None:
        wider = saved(replace(chosen, weight_bytes=4))
        said.append(f"frozen weights in bfloat16: saves {wider}, keeps two to three digits of each")
    return tuple(said)


def _remedy(request: FitRequest, dtype: Dtype, available: int) -> str:
    """What would make it fit, the least painful first."""
    released = {
        "micro_batch": replace(request, micro_batch=None),
        "gradient_checkpointing": replace(request, gradient_checkpointing=None),
        "micro_batch and gradient_checkpointing": replace(request, micro_batch=None, gradient_checkpointing=None),
    }
    for names, other in released.items():
        if _fits(other, dtype, available):
            return f"leave {names} unset"
    open_again = released["micro_batch and gradient_checkpointing"]
    divided = replace(open_again, engine="fsdp2")
    if request.engine == "ddp" and request.processes > 1 and _fits(divided, dtype, available):
        return "divide the model among the processes: set engine to fsdp2"
    if request.method == "full" and _fits(replace(open_again, method="lora"), dtype, available):
        return "train an adapter: set method to lora"
    tokens = longest_that_fits(open_again, available, dtype)
    if tokens >= SHORTEST:
        return (
            f"rows of up to {tokens:,} tokens fit, and the longest has {request.longest:,}: "
            f"make the dataset with max_length {tokens}"
        )
    return "train a smaller model, or on a machine with more memory"


def _fits(request: FitRequest, dtype: Dtype, available: int) -> bool:
    return any(estimate(request.model, run).total <= available for run in _candidates(request, dtype))
