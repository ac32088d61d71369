"""The objectives, by name."""

from __future__ import annotations

from gymtrl.training.dpo import DPO
from gymtrl.training.grpo import GRPO
from gymtrl.training.kto import KTO
from gymtrl.training.objective import Name, Objective
from gymtrl.training.sft import SFT

OBJECTIVES: dict[Name, Objective] = {objective.name: objective for objective in (SFT, DPO, KTO, GRPO)}
