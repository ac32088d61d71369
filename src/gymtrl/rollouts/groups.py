"""Which rollouts answer the same task: of one run, and of several that were collected differently."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache

from .codec import digest
from .record import Rollout


def group_key(rollout: Rollout) -> str:
    """Key of the group of a rollout: same file, same environment or agent, same task index, else same task.

    An index alone proves nothing: where prompts differ within one group (`task_key`), its rollouts are no group. That
    shows only when all of them are read; see `rollout_table`.

    Returns:
        `str`: 16 hex digits, the same whenever the same file is read under the same path.
    """
    task = rollout.task_key if rollout.task_index is None else rollout.task_index
    return _group_key(rollout.origin.file, rollout.environment or rollout.agent, task)


@lru_cache(maxsize=4096)
def _group_key(file: str, who: str | None, task: str | int) -> str:
    return digest([file, who, task])[:16]


def tie(keys: Iterable[tuple[str, Sequence[Hashable]]]) -> dict[str, str]:
    """Ties keys that share a mark, directly or through others.

    Args:
        keys (`Iterable[tuple[str, Sequence[Hashable]]]`): Keys, which may repeat, with their marks.

    Returns:
        `dict[str, str]`: For each key the smallest of all that are tied to it.
    """
    parent: dict[str, str] = {}
    owner: dict[Hashable, str] = {}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for key, marks in keys:
        parent.setdefault(key, key)
        for mark in marks:
            first, second = sorted((root(key), root(owner.setdefault(mark, key))))
            parent[second] = first
    return {key: root(key) for key in parent}


def tied_tasks(rollouts: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Ties tasks that share an input row; one that was collected with and without its sidecar is one by its task key.

    Args:
        rollouts (`Iterable[tuple[str, str | None]]`): `task_key` and `input_key` of every rollout.

    Returns:
        `dict[str, str]`: For each task key the one that stands for all that are the same task.
    """
    return tie((task, [] if row is None else [row]) for task, row in rollouts)
