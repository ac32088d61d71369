"""Collecting rollouts as a stage: an artefact folder that an interrupted run goes on with."""

from __future__ import annotations

from pathlib import Path

from gymtrl.gym.collect import Collection, read_tasks
from gymtrl.gym.settings import CollectSettings
from gymtrl.validation.session import GymSession
from gymtrl.workspace.artefact import artefact


def collect_rollouts(
    model: Path, tasks: Path, out: Path, settings: CollectSettings, *, session: GymSession
) -> Collection:
    """Serves a model and collects its rollouts on tasks into `out/rollouts.jsonl`, with Gym's sidecars beside it.

    Args:
        model (`Path`): Folder that transformers loads.
        tasks (`Path`): Gym input rows (JSONL).
        out (`Path`): Folder to write.
        settings (`CollectSettings`): Repeats, sampling, limits, agent.
        session (`GymSession`): Where Gym runs, or will.

    Raises:
        UserError: Bad tasks. RunError: Gym or the endpoint failed.
    """
    inputs = [model, tasks]
    with artefact(out, verb="collect", settings=settings, inputs=inputs, resumable=True) as draft:
        file = draft.path / "rollouts.jsonl"
        collected = session.collect(model, read_tasks(tasks), file, settings, name="rollouts")
        draft.extra |= {"rollouts": collected.collected, "failed": collected.failed}
    return collected
