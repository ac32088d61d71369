"""Every rule, in the order of the documentation."""

from __future__ import annotations

from gymtrl.doctor.data import DATA_RULES
from gymtrl.doctor.gradients import GRADIENT_RULES
from gymtrl.doctor.groups import GROUP_RULES
from gymtrl.doctor.loss import LOSS_RULES
from gymtrl.doctor.preference import PREFERENCE_RULES

RULES = (*DATA_RULES, *LOSS_RULES, *GRADIENT_RULES, *PREFERENCE_RULES, *GROUP_RULES)

STOPPING = frozenset(rule.code for rule in RULES if rule.stops)
"""Codes of the rules that end training."""
