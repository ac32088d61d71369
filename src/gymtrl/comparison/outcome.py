"""Turning a comparison into an exit status, for those who ask for it."""

from __future__ import annotations

from gymtrl.comparison.compare import Comparison
from gymtrl.errors import UserError

_FAILS = {"regressed": ("regressed",), "not-improved": ("regressed", "not shown")}


def check_outcome(comparison: Comparison | None, fail_on: str | None) -> int:
    """Returns 1 where the outcome is one that `fail_on` names, else 0. Without a comparison only checks the name.

    Raises:
        UserError: `fail_on` is unknown.
    """
    if fail_on is None:
        return 0
    if fail_on not in _FAILS:
        raise UserError(f"--fail-on {fail_on}: unknown", remedy=f"known: {', '.join(_FAILS)}")
    return int(comparison is not None and comparison.outcome in _FAILS[fail_on])
