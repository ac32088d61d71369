"""Collecting rollouts: each one once, whatever fails on the way.

A Gym that we started collects with its own command, which ends at the first HTTP error and keeps to no time-out. What
it leaves is asked of the same agents one by one, so that a failure costs its own rollout alone and has its reason kept.
Where a server of Gym ends, Gym is started again and what is missing is asked again. All append to the same files, from
which the next run, ours or Gym's, goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gymtrl.errors import RunError, UserError
from gymtrl.gym.agents import Row, ask_agents
from gymtrl.gym.command import run_collection
from gymtrl.gym.servers import GymDied, RunningGym
from gymtrl.gym.settings import CollectSettings


@dataclass(frozen=True)
class Collection:
    """What a collection wrote.

    Attributes:
        path (`Path`): The rollouts.
        wanted (`int`): Tasks times repeats.
        collected (`int`): Rollouts in the file.
        failed (`int`): Rollouts whose every attempt failed; their reasons stand in `X_failures.jsonl`.
    """

    path: Path
    wanted: int
    collected: int
    failed: int


def read_tasks(path: Path) -> list[Row]:
    """Reads Gym input rows.

    Raises:
        UserError: The file is missing, empty, or has a line that is no task row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", remedy="give a JSONL file of Gym tasks with --tasks") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
        except msgspec.MsgspecError as error:
            raise UserError(f"{path}:{number}: not JSON: {error}", remedy="mend or remove the line") from None
        problem = _task_problem(row)
        if problem:
            remedy = "give Gym's input rows, such as heldout_inputs.jsonl or *_materialized_inputs.jsonl"
            raise UserError(f"{path}:{number}: not a Gym task: {problem}", remedy=remedy)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no tasks", remedy="give a JSONL file with one Gym task per line")
    return rows


def _task_problem(row: Any) -> str:
    """What is wrong with a task row, `""` where nothing is."""
    if not isinstance(row, dict) or not isinstance(row.get("responses_create_params"), dict):
        return "it has no responses_create_params"
    if not isinstance(row.get("agent_ref") or {}, dict):
        return "agent_ref is no object"
    metadata = row["responses_create_params"].get("metadata") or {}
    if not isinstance(metadata, dict):
        return "metadata of responses_create_params is no object"
    try:
        extra = json.loads(metadata.get("extra_body") or "{}")
    except (TypeError, ValueError):
        extra = None
    return "" if isinstance(extra, dict) else "metadata.extra_body is no JSON object in a string"


def materialize(tasks: Sequence[Row], settings: CollectSettings) -> list[Row]:
    """Returns one request per task and repeat, as Gym's collection numbers them.

    Raises:
        UserError: A task names no agent, and the settings do not either.
    """
    rows = []
    for index, task in enumerate(tasks):
        if settings.agent is None and not isinstance((task.get("agent_ref") or {}).get("name"), str):
            raise UserError(f"task {index + 1} names no agent (agent_ref.name)", remedy="name one with --agent")
        for repeat in range(settings.repeats):
            asked = dict(task["responses_create_params"])
            asked |= {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "max_output_tokens": settings.max_output_tokens,
            }
            metadata = dict(asked.get("metadata") or {})
            extra = json.loads(metadata.get("extra_body") or "{}") | {"seed": _seed(settings.seed, index, repeat)}
            asked["metadata"] = metadata | {"extra_body": json.dumps(extra)}
            row = {k: v for k, v in task.items() if not k.startswith("_ng_")}
            row |= {"responses_create_params": asked, "_ng_task_index": index, "_ng_rollout_index": repeat}
            if settings.agent is not None:
                row["agent_ref"] = {"name": settings.agent}
            rows.append(row)
    return rows


def collect(
    ready: Callable[[], RunningGym],
    tasks: Sequence[Row],
    out: Path,
    settings: CollectSettings,
    *,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collection:
    """Collects rollouts into `out`, with `_materialized_inputs` and `_failures` beside it; resumes what is there.

    Args:
        ready (`Callable[[], RunningGym]`): Returns a Gym that answers, started again where a server has ended.
        tasks (`Sequence[Row]`): Gym input rows.
        out (`Path`): The rollouts file, appended to rollout by rollout.
        settings (`CollectSettings`): Repeats, sampling, limits, agent.
        check (`Callable[[], None]`, *optional*): Called about twice a second; raises when the policy's endpoint ended.
        progress (`Callable[[int, int], None]`, *optional*): Called with rollouts done and wanted.

    Raises:
        RunError: Gym, the agent or the endpoint went away for good, or every rollout failed.
        UserError: The file beside `out` belongs to a collection of other tasks or settings.
    """
    rows = materialize(tasks, settings)
    todo, failures = _prepare(out, rows)
    progress(len(rows) - len(todo), len(rows))
    by_command = True
    while todo:
        gym = ready()
        urls = {name: gym.agent_url(name) for name in {row["agent_ref"]["name"] for row in todo}}
        done = len(rows) - len(todo)

        def watch(gym: RunningGym = gym) -> None:
            gym.check()
            check()

        def report(now: int, done: int = done) -> None:
            progress(done + now, len(rows))

        try:
            if gym.own is not None and by_command:
                run_collection(gym.own, out, settings, watch=watch, report=report)
                by_command = False
            else:
                ask_agents(urls, todo, out, failures, settings, watch=watch, report=report)
                break
        except GymDied:
            pass  # started again by `ready`, as often as it does that
        todo, _ = _prepare(out, rows)
    return _collection(out, len(rows), failures)


def finished(tasks: Sequence[Row], out: Path, settings: CollectSettings) -> Collection | None:
    """Returns the collection if nothing of it is left to do, so that no server need be started; else `None`."""
    rows = materialize(tasks, settings)
    if not out.exists():
        return None
    todo, failures = _prepare(out, rows)
    return None if todo else _collection(out, len(rows), failures)


def _collection(out: Path, wanted: int, failures: Path) -> Collection:
    collected = len(_whole_lines(out))
    if not collected:
        raise RunError("no rollout could be collected", remedy=f"the reasons stand in {failures}")
    return Collection(out, wanted, collected, wanted - collected)


def _prepare(out: Path, rows: Sequence[Row]) -> tuple[list[Row], Path]:
    """Writes the inputs' sidecar; returns what is left to do, and the file for failed attempts.

    What failed in an earlier run is tried again: its cause may be mended by now.
    """
    inputs, failures = (out.with_name(f"{out.stem}_{kind}.jsonl") for kind in ("materialized_inputs", "failures"))
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not inputs.exists() or inputs.read_bytes() != lines:
        if out.exists():
            raise UserError(f"{out} is another collection's", remedy="choose another file, or remove it")
        # Whole or absent: by this file the rollouts beside it are known again.
        draft = inputs.with_name(f".{inputs.name}.partial")
        draft.write_bytes(lines)
        draft.replace(inputs)
    have = {_key(row) for row in _whole_lines(out)}
    return [row for row in rows if _key(row) not in have], failures


def _whole_lines(path: Path) -> list[Row]:
    """Reads what an earlier run wrote; a last line that it could not finish is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [_read_back(line, f"{path}:{number}") for number, line in enumerate(whole.splitlines(), 1)]


def _read_back(line: bytes, place: str) -> Row:
    try:
        row: Row = msgspec.json.decode(line)
        _key(row)
    except (msgspec.MsgspecError, LookupError, TypeError):
        remedy = "remove the line; its rollout is then collected anew"
        raise UserError(f"{place}: not a rollout of this collection", remedy=remedy) from None
    return row


def _key(row: Row) -> tuple[int, int]:
    return row["_ng_task_index"], row["_ng_rollout_index"]


def _seed(seed: int, task: int, repeat: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{repeat}".encode()).digest()[:4], "big")
