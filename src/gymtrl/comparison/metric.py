"""What is compared: the reward, another number of the row, or whether such a number passes a bound."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import to_float
from gymtrl.rollouts.keys import look_up
from gymtrl.rollouts.record import Rollout

EXAMPLES = "for example reward, reward_components.format, 'reward>=0.8', 'response.usage.output_tokens<=500'"

_COMPONENTS = "reward_components."
_SIGN = re.compile(r">=|<=|==|!=|>|<")
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Metric(NamedTuple):
    """A number of each rollout.

    Attributes:
        path (`str`): Dotted path into the row.
        sign (`str`): How the number is held against `bound`, which makes it 0 or 1; `""` where it counts as it is.
        bound (`float`): The bound.
    """

    path: str
    sign: str = ""
    bound: float = 0.0

    @property
    def in_record(self) -> bool:
        """Whether the record holds the number, so that the row need not be read again."""
        return self.path == "reward" or self.path.startswith(_COMPONENTS)

    def __str__(self) -> str:
        return f"{self.path}{self.sign}{self.bound:g}" if self.sign else self.path


def parse_metric(text: str) -> Metric:
    """Reads a metric as a user writes it: a dotted path, or a path with a bound.

    Raises:
        UserError: There is no path, or the bound is no finite number.
    """
    sign = _SIGN.search(text)
    path = (text[: sign.start()] if sign else text).strip()
    if not path or any(not part for part in path.split(".")) or any(c.isspace() or c == "=" for c in path):
        raise UserError(f"{text!r} is no metric: it names no value of a row", remedy=EXAMPLES)
    if sign is None:
        return Metric(path)
    try:
        bound = float(text[sign.end() :])
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise UserError(f"{text!r} is no metric: {text[sign.end() :]!r} is no finite number", remedy=EXAMPLES)
    return Metric(path, sign.group(), bound)


def measure(metric: Metric, rollout: Rollout, row: Callable[[Rollout], Any]) -> float | None:
    """The metric of a rollout.

    Args:
        metric (`Metric`): The metric.
        rollout (`Rollout`): The record.
        row (`Callable[[Rollout], Any]`): Gives its decoded row; called only where the record does not hold the number.

    Returns:
        `float`, *optional*: `None` where the row has no such number; may be non-finite.
    """
    if metric.path == "reward":
        value = rollout.reward
    elif metric.in_record:
        value = rollout.reward_components.get(metric.path.removeprefix(_COMPONENTS))
    else:
        found = look_up(row(rollout), metric.path)
        value = to_float(found) if isinstance(found, int | float) else None
    if value is None or not metric.sign or value != value:
        return value
    return float(_HOLDS[metric.sign](value, metric.bound))
