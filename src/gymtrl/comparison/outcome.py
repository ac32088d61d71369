"""Turning a comparison into an exit status, for those who ask for it."""

from __future__ import annotations

from gymtrl.comparison.compare import Comparison

_FAILS = {None: (), "regressed": ("regressed",), "not-improved": ("regressed", "not shown")}


def exit_status(comparison: Comparison, fail_on: str | None) -> int:
    """Returns 1 where the outcome is one that `fail_on` (`regressed` or `not-improved`) names, else 0."""
    return int(comparison.outcome in _FAILS[fail_on])
