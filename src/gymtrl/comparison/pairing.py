"""Which tasks two collections share, and why the others have no partner."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gymtrl.comparison.collection import Asked, Collection
from gymtrl.comparison.record import Reason, Unpaired
from gymtrl.errors import UserError

Key = tuple[str, str]
"""Environment, and input key or task key."""

_EXAMPLES = 3


class Half(NamedTuple):
    """The rollouts of the paired tasks on one side.

    Attributes:
        rows (`ndarray`): Their places in the columns of the collection.
        tasks (`ndarray`): The task of each.
    """

    rows: NDArray[np.int64]
    tasks: NDArray[np.int64]


class Pairing(NamedTuple):
    """The tasks that both collections have.

    Attributes:
        keys (`list[Key]`): One a task, sorted.
        asked (`list[Asked]`): What it asks, as it stands in the collection before.
        before, after (`Half`): Its rollouts.
        unpaired (`tuple[Unpaired, ...]`): The other tasks.
    """

    keys: list[Key]
    asked: list[Asked]
    before: Half
    after: Half
    unpaired: tuple[Unpaired, ...]


def pair(before: Collection, after: Collection) -> Pairing:
    """Pairs the tasks of two collections, by `input_key` where all have one, else by `task_key`.

    Tasks that share an input row and not the prompt are no pair: something between the row and the model has changed.
    A harness that asks otherwise each time, as one that tells the time, is known by several rollouts of a task; with
    one on each side it cannot be told from one that has changed, and the tasks are no pair.

    Raises:
        UserError: The collections were sampled differently, or by other agents, or share no task.
    """
    _refuse_different_sampling(before, after)
    by_input = all(asked.input_key for side in (before, after) for asked in side.asked)
    sides = [_by_key(side.asked, by_input) for side in (before, after)]
    valid = [{_key(side.asked[code], by_input) for code in set(side.codes.tolist())} for side in (before, after)]
    shared = sides[0].keys() & sides[1].keys()
    changed = _changed(shared, sides, [_rollouts(side, by_input) for side in (before, after)])
    keys = sorted((shared - changed) & valid[0] & valid[1])
    unpaired = _unpaired(sides, valid, changed)
    if not keys:
        raise _nothing_shared(before, after, unpaired)
    numbers = {key: number for number, key in enumerate(keys)}
    first, second = (_half(side, numbers, by_input) for side in (before, after))
    return Pairing(keys, [sides[0][key][0] for key in keys], first, second, unpaired)


def _key(asked: Asked, by_input: bool) -> Key:
    return asked.environment, (asked.input_key if by_input else None) or asked.task_key


def _by_key(asked: Iterable[Asked], by_input: bool) -> dict[Key, list[Asked]]:
    found: dict[Key, list[Asked]] = defaultdict(list)
    for one in asked:
        found[_key(one, by_input)].append(one)
    return dict(found)


def _half(side: Collection, numbers: Mapping[Key, int], by_input: bool) -> Half:
    task_of = np.array([numbers.get(_key(asked, by_input), -1) for asked in side.asked], dtype=np.int64)
    tasks = task_of[side.codes]
    rows = np.flatnonzero(tasks >= 0)
    return Half(rows, tasks[rows])


def _rollouts(side: Collection, by_input: bool) -> Counter[Key]:
    """How many rollouts of each task have a valid value."""
    found: Counter[Key] = Counter()
    for asked, rollouts in zip(side.asked, np.bincount(side.codes, minlength=len(side.asked)).tolist(), strict=True):
        found[_key(asked, by_input)] += rollouts
    return found


def _changed(
    shared: Iterable[Key], sides: Sequence[Mapping[Key, list[Asked]]], rollouts: Sequence[Counter[Key]]
) -> set[Key]:
    """Tasks asked in no way that both sides share, where that is no habit of a harness.

    It is none where a side asked several times in one way. With one rollout on each side nothing tells.
    """
    found = set()
    for key in shared:
        before, after = ({asked.task_key for asked in side[key]} for side in sides)
        if before & after:
            continue
        several = [counts[key] > 1 for counts in rollouts]
        one_way = [len(ways) == 1 for ways in (before, after)]
        if any(a and b for a, b in zip(several, one_way, strict=True)) or all(one_way):
            found.add(key)
    return found


def _unpaired(
    sides: Sequence[Mapping[Key, list[Asked]]], valid: Sequence[set[Key]], changed: set[Key]
) -> tuple[Unpaired, ...]:
    before, after = ({key: asked[0] for key, asked in side.items()} for side in sides)
    alone = before.keys() ^ after.keys()
    pairs = [(key, key) for key in before if key in changed]
    pairs += _same_question(
        {k: v for k, v in before.items() if k in alone}, {k: v for k, v in after.items() if k in alone}
    )
    met = {key for pair in pairs for key in pair}
    shared = before.keys() & after.keys() - changed
    found = [_other_prompts([(before[a], after[b]) for a, b in pairs])] if pairs else []
    found += _left("only_before", "only before", before, before.keys() & alone - met)
    found += _left("only_after", "only after", after, after.keys() & alone - met)
    found += _left("no_value", "without a valid value before", before, shared - valid[0])
    found += _left("no_value", "without a valid value after", after, (shared & valid[0]) - valid[1])
    return tuple(found)


def _same_question(before: dict[Key, Asked], after: dict[Key, Asked]) -> list[tuple[Key, Key]]:
    """Pairs of tasks that ask the same question otherwise."""
    asking: dict[str, list[Key]] = defaultdict(list)
    for key in reversed(before):
        if before[key].question:
            asking[before[key].parts["question"]].append(key)
    pairs = []
    for key in after:
        if partners := asking.get(after[key].parts["question"]):
            pairs.append((partners.pop(), key))
    return pairs


def _other_prompts(pairs: Sequence[tuple[Asked, Asked]]) -> Unpaired:
    differing = {name for a, b in pairs for name in _differing(a, b)}
    places = tuple(f"{a.place} and {b.place}" for a, b in pairs[:_EXAMPLES])
    return Unpaired("other_prompt", len(pairs), f"with another {' and another '.join(sorted(differing))}", places)


def _differing(a: Asked, b: Asked) -> set[str]:
    names = {name for name in a.parts if a.parts[name] != b.parts[name]}
    if a.environment != b.environment:
        names.add("environment")
    return names or {"input row"}


def _left(reason: Reason, detail: str, side: Mapping[Key, Asked], keys: Iterable[Key]) -> list[Unpaired]:
    wanted = set(keys)
    places = [asked.place for key, asked in side.items() if key in wanted]
    return [Unpaired(reason, len(places), detail, tuple(places[:_EXAMPLES]))] if places else []


def _refuse_different_sampling(before: Collection, after: Collection) -> None:
    both = before.sampling.keys() & after.sampling.keys()
    if not both:
        raise _different(before, after, "collected by", before.sampling, after.sampling)
    for environment in sorted(both):
        x, y = before.sampling[environment], after.sampling[environment]
        if x != y:
            raise _different(before, after, "sampled", x, y)


def _different(before: Collection, after: Collection, what: str, x: Iterable[object], y: Iterable[object]) -> UserError:
    first, second = (", ".join(sorted(map(str, side))) for side in (x, y))
    return UserError(
        f"{before.side.name} and {after.side.name} were {what} differently: {first} against {second}",
        remedy="collect both with the same settings and agent",
    )


def _nothing_shared(before: Collection, after: Collection, unpaired: Sequence[Unpaired]) -> UserError:
    reasons = "; ".join(f"{u.tasks} {u.detail} ({u.examples[0]})" for u in unpaired)
    remedy = "collect both on the same tasks with the same agent and prompts: 'gymtrl validate' does"
    if any(u.reason == "other_prompt" for u in unpaired):
        remedy += (
            "; that a harness asks otherwise each time, as where it tells the time, is seen with the inputs that Gym "
            "writes beside each file and two rollouts of each task"
        )
    return UserError(f"{before.side.name} and {after.side.name} have no task in common: {reasons}", remedy=remedy)
