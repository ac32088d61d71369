"""All rules on one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gymtrl.doctor.finding import SEVERITIES, Finding
from gymtrl.doctor.rule import Moment
from gymtrl.doctor.rules import RULES
from gymtrl.doctor.run import RunRecord

_PAST = "seen in training, not any more: "


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
    return errors_first(findings)


def with_told(found: Iterable[Finding], told: Iterable[Finding]) -> list[Finding]:
    """Adds to what the rules find of a run what they found while it trained and do not find any more.

    Args:
        found (`Iterable[Finding]`): Of the run as it is.
        told (`Iterable[Finding]`): Of its `findings.json`.

    Returns:
        `list[Finding]`: Errors first; the evidence of those that hold no more says so.
    """
    now = {finding.rule: finding for finding in found}
    past = (replace(one, evidence=f"{_PAST}{one.evidence.removeprefix(_PAST)}") for one in told)
    return errors_first([*now.values(), *(finding for finding in past if finding.rule not in now)])


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
