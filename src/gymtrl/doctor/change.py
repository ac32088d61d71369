"""A policy before and after training as a comparison tells it, and what a rule about it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gymtrl.comparison.estimate import MeanEstimate
from gymtrl.comparison.record import Candidate, Comparison, Cost
from gymtrl.doctor.finding import Finding, Severity

POINTS = 0.05
"""The smallest change of a share that is worth telling (ours)."""
FEWEST_TASKS = 10
"""Below this a standard error says little (ours)."""
MARGIN = 1.5
"""Times half of the 95 % interval: three standard errors, which chance passes about once in 400 times."""
BEYOND = f"ours: by {POINTS * 100:g} points, and beyond three standard errors"

_EXAMPLES = 3


@dataclass(frozen=True)
class Change:
    """What the rules look at.

    Attributes:
        comparison (`Comparison`): Of tasks that were not trained on.
        candidate (`Candidate`): The policy after training.
        trained_on (`Candidate`, *optional*): The same policy against the same baseline, on tasks that were trained on.
    """

    comparison: Comparison
    candidate: Candidate
    trained_on: Candidate | None = None

    def measures(self, *names: str) -> Iterator[tuple[str, Cost]]:
        """Environments with what was measured in them under these names."""
        for habits in self.candidate.habits:
            for cost in habits.measures:
                if cost.name in names:
                    yield habits.environment, cost

    def improved(self) -> set[str]:
        """Environments with a shown gain."""
        return {effect.environment for effect in self.candidate.environments if effect.outcome == "improved"}

    def told(self, difference: MeanEstimate) -> str:
        """A difference of the metric with its interval, in words."""
        d = difference
        if self.comparison.points:
            return f"{d.mean * 100:+.1f} points [{d.low * 100:+.1f}, {d.high * 100:+.1f}]"
        return f"{d.mean:+.3g} [{d.low:+.3g}, {d.high:+.3g}]"


@dataclass(frozen=True)
class ChangeRule:
    """One thing that training can have made worse.

    Attributes:
        code (`str`): Its name in findings.
        severity (`str`): As in `Finding`.
        title (`str`): What is the matter.
        cause (`str`): The likely cause.
        remedy (`str`): What to do.
        source (`str`): Where its threshold comes from.
        check (`Callable[[Change], str | None]`): What was seen, with numbers; `None` where all is well.
    """

    code: str
    severity: Severity
    title: str
    cause: str
    remedy: str
    source: str
    check: Callable[[Change], str | None]

    def apply(self, change: Change) -> Finding | None:
        """What the rule finds in a change."""
        evidence = self.check(change)
        if evidence is None:
            return None
        return Finding(self.code, self.severity, self.title, evidence, self.cause, self.remedy)


def beyond_noise(difference: MeanEstimate) -> bool:
    """Whether a difference, up or down, is larger than chance makes it."""
    half = difference.high - difference.mean
    return difference.n >= FEWEST_TASKS and abs(difference.mean) > MARGIN * half


def more_of(*names: str, what: str = "rollouts") -> Callable[[Change], str | None]:
    """A check that finds the environments in which shares grew.

    Args:
        names (`str`): Measures that are shares.
        what (`str`, *optional*, defaults to `"rollouts"`): What they are shares of.
    """

    def check(change: Change) -> str | None:
        return listed([shares_told(name, cost, what) for name, cost in grown(change, *names)])

    return check


def grown(change: Change, *names: str) -> list[tuple[str, Cost]]:
    """Environments with the shares that grew in them, those that grew most first."""
    found = [
        (name, cost)
        for name, cost in change.measures(*names)
        if cost.difference.mean >= POINTS and beyond_noise(cost.difference)
    ]
    return sorted(found, key=lambda one: -one[1].difference.mean)


def shares_told(environment: str, cost: Cost, what: str) -> str:
    """How a share changed in an environment, in words."""
    places = f", such as {cost.examples[0]}" if cost.examples else ""
    return f"{environment}: {cost.name} in {cost.before:.1%} of the {what} before, {cost.after:.1%} after{places}"


def listed(found: Sequence[str]) -> str | None:
    """The first few of what was found, in one line; `None` where there is nothing."""
    if not found:
        return None
    rest = f"; and {len(found) - _EXAMPLES} more" if len(found) > _EXAMPLES else ""
    return "; ".join(found[:_EXAMPLES]) + rest
