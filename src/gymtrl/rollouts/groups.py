"""Which rollouts of one run answer the same task."""

from __future__ import annotations

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
    return digest([rollout.origin.file, rollout.environment or rollout.agent, task])[:16]
