"""A comparison in one sentence, and as an exit status."""

from __future__ import annotations

from collections.abc import Sequence

from gymtrl.comparison.estimate import LEVEL
from gymtrl.comparison.record import Comparison, Effect, Outcome

_WORST_FIRST: tuple[Outcome, ...] = ("regressed", "not shown", "improved")


def sentence(overall: Effect, environments: Sequence[Effect], *, points: bool, min_effect: float) -> str:
    """The verdict on a candidate.

    Args:
        overall (`Effect`): All paired tasks.
        environments (`Sequence[Effect]`): Each environment.
        points (`bool`): Differences are told in hundredths.
        min_effect (`float`): The smallest difference that counts.
    """
    d, scale = overall.difference, 100.0 if points else 1.0
    unit = " points" if points else ""
    interval = f"[{_signed(d.low, scale)}, {_signed(d.high, scale)}]"
    if overall.outcome == "not shown":
        start = f"Not shown: {_signed(d.mean, scale)}{unit} {interval}{_why_not(overall, scale, unit, min_effect)}"
    else:
        start = f"{overall.outcome.capitalize()} by {_number(abs(d.mean), scale)}{unit} {interval}"
    parts = [start, f"{_count(overall.fixed, 'task')} fixed, {overall.broken} broken"]
    for effect in environments:
        if effect.outcome not in (overall.outcome, "not shown"):
            size = _number(abs(effect.difference.mean), scale)
            parts.append(f"{effect.environment} {effect.outcome} by {size}{unit}")
    if not d.alike:
        could = _number(d.detectable + min_effect, scale)
        parts.append(f"{_count(d.n, 'task')} × {_repeats(overall)} could have shown {could}")
    return "; ".join(parts) + "."


def least_favourable(outcomes: Sequence[Outcome]) -> Outcome:
    """The worst of several outcomes."""
    return min(outcomes, key=_WORST_FIRST.index)


def exit_status(comparison: Comparison, fail_on: str | None) -> int:
    """1 where the comparison fails the check that the user asked for, else 0.

    Args:
        comparison (`Comparison`): The result.
        fail_on (`str`, *optional*): `regression`: a candidate regressed, in all or in one environment.
            `no-improvement`: the same, or a candidate is not shown to have improved.
    """
    effects = [effect for c in comparison.candidates for effect in (c.overall, *c.environments)]
    regressed = any(effect.outcome == "regressed" for effect in effects)
    lacking = any(candidate.outcome != "improved" for candidate in comparison.candidates)
    return int(fail_on is not None and (regressed or (fail_on == "no-improvement" and lacking)))


def _why_not(effect: Effect, scale: float, unit: str, min_effect: float) -> str:
    """Why a difference is not shown although its interval leaves out zero; `""` where it does not."""
    d = effect.difference
    if d.low <= 0 <= d.high:
        return ""
    if min(abs(d.low), abs(d.high)) <= min_effect:
        return f", which may be less than the {_number(min_effect, scale)}{unit} that count"
    if effect.p <= 1 - LEVEL:
        return f", which chance may give one of so many candidates (p = {effect.p_adjusted:.2g})"
    return f", which so few clusters cannot tell from chance (p = {effect.p:.2g})"


def _repeats(effect: Effect) -> str:
    fewest, most = effect.repeats
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _signed(value: float, scale: float) -> str:
    return f"{value * scale:+.1f}" if scale != 1 else f"{value:+.3g}"


def _number(value: float, scale: float) -> str:
    return f"{value * scale:.1f}" if scale != 1 else f"{value:.3g}"
