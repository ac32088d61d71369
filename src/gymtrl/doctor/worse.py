"""All rules about a policy after training, on one comparison."""

from __future__ import annotations

from dataclasses import replace

from gymtrl.comparison.record import Comparison
from gymtrl.doctor.answers import ANSWER_RULES
from gymtrl.doctor.change import Change
from gymtrl.doctor.diagnose import errors_first
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.tasks import TASK_RULES
from gymtrl.doctor.tool_use import TOOL_RULES
from gymtrl.errors import UserError

CHANGE_RULES = (*TASK_RULES, *ANSWER_RULES, *TOOL_RULES)
"""Every rule, in the order of the documentation."""


def diagnose_comparison(comparison: Comparison, trained_on: Comparison | None = None) -> list[Finding]:
    """Says what training made worse.

    Args:
        comparison (`Comparison`): Of tasks that were not trained on.
        trained_on (`Comparison`, *optional*): Of tasks that were trained on, with the same candidates in this order.

    Returns:
        `list[Finding]`: Errors first, then warnings, then notes; with several candidates the evidence names each.

    Raises:
        UserError: The two comparisons are of different metrics or numbers of candidates.
    """
    if trained_on is not None and (trained_on.metric, len(trained_on.candidates)) != (
        comparison.metric,
        len(comparison.candidates),
    ):
        raise UserError(
            f"one comparison is of {comparison.metric} with {len(comparison.candidates)} candidates, the one on "
            f"training tasks of {trained_on.metric} with {len(trained_on.candidates)}",
            remedy="compare both with the same --metric and the same candidates",
        )
    found = []
    for place, candidate in enumerate(comparison.candidates):
        change = Change(comparison, candidate, trained_on.candidates[place] if trained_on else None)
        told = [finding for rule in CHANGE_RULES if (finding := rule.apply(change)) is not None]
        if len(comparison.candidates) > 1:
            told = [replace(finding, evidence=f"{candidate.after.name}: {finding.evidence}") for finding in told]
        found += told
    return errors_first(found)
