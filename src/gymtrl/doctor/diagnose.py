"""All rules on one run."""

from __future__ import annotations

from gymtrl.doctor.finding import SEVERITIES, Finding
from gymtrl.doctor.rule import Moment
from gymtrl.doctor.rules import RULES
from gymtrl.doctor.run import RunRecord


def diagnose(record: RunRecord, moment: Moment) -> list[Finding]:
    """Applies the rules of a moment.

    Args:
        record (`RunRecord`): What is known of the run.
        moment (`str`): `preflight`, `live` or `after`.

    Returns:
        `list[Finding]`: Errors first, then warnings, then notes.
    """
    rules = [rule for rule in RULES if moment in rule.when and record.objective in rule.objectives]
    findings = [finding for rule in rules if (finding := rule.apply(record)) is not None]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
