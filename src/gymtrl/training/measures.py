"""What is tried, in which order, when memory runs out in training."""

from __future__ import annotations

from dataclasses import replace

from gymtrl.training.objective import Objective
from gymtrl.training.plan import Plan


def next_measure(plan: Plan, objective: Objective) -> tuple[Plan, str] | None:
    """The next thing to try, which leaves the rows of every step and their loss as they are.

    First the micro-batch is halved and the accumulation doubled; then activations are computed again in place of kept;
    then, on a GPU, they wait in main memory. Where the loss depends on the micro-batch, that comes last: KTO's does
    through the rows that are paired in it, and TRL's `sft` term of DPO is a mean over the tokens of a micro-batch.

    Args:
        plan (`Plan`): With which memory ran out.
        objective (`Objective`): What is trained.

    Returns:
        `tuple[Plan, str]`: The new numbers, and the measure in words. `None` where nothing is left to try.
    """
    order = [_smaller, _checkpointing, _offload] if objective.free_micro else [_checkpointing, _offload, _smaller]
    for measure in order:
        found = measure(plan, objective)
        if found is not None:
            return found
    return None


def _smaller(plan: Plan, objective: Objective) -> tuple[Plan, str] | None:
    share = plan.effective_batch // plan.processes
    sizes = [n for n in range(objective.least_micro, plan.micro_batch // 2 + 1) if share % n == 0]
    if not sizes:
        return None
    micro = sizes[-1]
    words = f"micro-batch {plan.micro_batch} -> {micro}, accumulation {plan.accumulation} -> {share // micro}"
    return replace(plan, micro_batch=micro, accumulation=share // micro), words


def _checkpointing(plan: Plan, objective: Objective) -> tuple[Plan, str] | None:
    if plan.gradient_checkpointing:
        return None
    return replace(plan, gradient_checkpointing=True), "gradient checkpointing on"


def _offload(plan: Plan, objective: Objective) -> tuple[Plan, str] | None:
    if plan.offload or not plan.cuda or not objective.offloads:
        return None
    return replace(plan, offload=True), "activations wait in main memory"
