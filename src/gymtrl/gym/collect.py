"""Collecting rollouts from a running Gym, in the files that Gym's own collection writes.

Gym's `gym eval run` ends at the first HTTP error and spends many seconds on imports; this speaks to the same agents
over the same `/run`, keeps what failed apart with its reason, and goes on where an interrupted collection stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from gymtrl.errors import RunError, UserError
from gymtrl.gym.servers import RunningGym
from gymtrl.gym.settings import CollectSettings

Row = dict[str, Any]
_ATTEMPTS = 3  # as many as Gym's own collection makes (NEMO_GYM_MAX_ROLLOUT_ATTEMPTS)


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
        if not isinstance(row, dict) or not isinstance(row.get("responses_create_params"), dict):
            raise UserError(
                f"{path}:{number}: not a Gym task: it has no responses_create_params",
                remedy="give Gym's input rows, such as heldout_inputs.jsonl or *_materialized_inputs.jsonl",
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no tasks", remedy="give a JSONL file with one Gym task per line")
    return rows


def materialize(tasks: Sequence[Row], settings: CollectSettings, agent: str | None) -> list[Row]:
    """Returns one request per task and repeat, as Gym's collection numbers them.

    Raises:
        UserError: A task names no agent and `agent` is `None`.
    """
    rows = []
    for index, task in enumerate(tasks):
        if agent is None and not isinstance((task.get("agent_ref") or {}).get("name"), str):
            raise UserError(f"task {index + 1} names no agent (agent_ref.name)", remedy="name one with --agent")
        for repeat in range(settings.repeats):
            asked = dict(task["responses_create_params"])
            asked |= {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "max_output_tokens": settings.max_output_tokens,
            }
            metadata = dict(asked.get("metadata") or {})
            extra = json.loads(metadata.get("extra_body", "{}")) | {"seed": _seed(settings.seed, index, repeat)}
            asked["metadata"] = metadata | {"extra_body": json.dumps(extra)}
            row = {k: v for k, v in task.items() if not k.startswith("_ng_")}
            row |= {"responses_create_params": asked, "_ng_task_index": index, "_ng_rollout_index": repeat}
            if agent is not None:
                row["agent_ref"] = {"name": agent}
            rows.append(row)
    return rows


def collect(
    gym: RunningGym,
    tasks: Sequence[Row],
    out: Path,
    settings: CollectSettings,
    *,
    agent: str | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collection:
    """Collects rollouts into `out`, with `_materialized_inputs` and `_failures` beside it; resumes what is there.

    Args:
        gym (`RunningGym`): Where the agents run.
        tasks (`Sequence[Row]`): Gym input rows.
        out (`Path`): The rollouts file, appended to rollout by rollout.
        settings (`CollectSettings`): Repeats, sampling, limits.
        agent (`str`, *optional*): Agent for all tasks; else each row's `agent_ref`.
        check (`Callable[[], None]`, *optional*): Called about twice a second; raises when the policy's endpoint ended.
        progress (`Callable[[int, int], None]`, *optional*): Called with rollouts done and wanted.

    Raises:
        RunError: The agent or the endpoint went away, or every rollout failed.
        UserError: The file beside `out` belongs to a collection of other tasks or settings.
    """
    rows = materialize(tasks, settings, agent)
    todo, attempts, failures = _prepare(out, rows)
    progress(len(rows) - len(todo), len(rows))

    def report(now: int) -> None:
        progress(len(rows) - len(todo) + now, len(rows))

    def watch() -> None:
        gym.check()
        check()

    if todo:
        urls = {name: gym.agent_url(name) for name in {row["agent_ref"]["name"] for row in todo}}
        asyncio.run(_run_all(urls, todo, out, failures, attempts, settings, watch, report))
    found = _collection(out, len(rows))
    if not found.collected:
        raise RunError("no rollout could be collected", remedy=f"the reasons stand in {failures}")
    return found


def finished(tasks: Sequence[Row], out: Path, settings: CollectSettings, agent: str | None) -> Collection | None:
    """Returns the collection if nothing of it is left to do, so that no server need be started; else `None`."""
    rows = materialize(tasks, settings, agent)
    if not out.exists() or _prepare(out, rows)[0]:
        return None
    return _collection(out, len(rows))


def _collection(out: Path, wanted: int) -> Collection:
    collected = len(_whole_lines(out))
    return Collection(out, wanted, collected, wanted - collected)


def _prepare(out: Path, rows: Sequence[Row]) -> tuple[list[Row], Counter[tuple[int, int]], Path]:
    """Writes the inputs' sidecar; returns what is left to do, the failed attempts so far, and their file."""
    inputs, failures = (out.with_name(f"{out.stem}_{kind}.jsonl") for kind in ("materialized_inputs", "failures"))
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and (not inputs.exists() or inputs.read_bytes() != lines):
        raise UserError(f"{out} is another collection's", remedy="choose another file, or remove it")
    inputs.write_bytes(lines)
    have = {_key(row) for row in _whole_lines(out)}
    attempts = Counter(_key(row) for row in _whole_lines(failures))
    todo = [row for row in rows if _key(row) not in have and attempts[_key(row)] < _ATTEMPTS]
    return todo, attempts, failures


async def _run_all(
    urls: dict[str, str],
    todo: Sequence[Row],
    out: Path,
    failures: Path,
    attempts: Counter[tuple[int, int]],
    settings: CollectSettings,
    watch: Callable[[], None],
    report: Callable[[int], None],
) -> None:
    gate = asyncio.Semaphore(settings.concurrency)
    ended = 0
    limits = httpx.Limits(max_connections=settings.concurrency)
    async with httpx.AsyncClient(timeout=settings.timeout, limits=limits) as client:
        with out.open("ab", buffering=0) as good, failures.open("ab", buffering=0) as bad:

            async def one(row: Row) -> None:
                nonlocal ended
                async with gate:
                    while attempts[_key(row)] < _ATTEMPTS:
                        result = await _run_one(client, urls[row["agent_ref"]["name"]], row)
                        (bad if "_ng_failure_class" in result else good).write(msgspec.json.encode(result) + b"\n")
                        if "_ng_failure_class" not in result:
                            break
                        attempts[_key(row)] += 1
                ended += 1

            pending = {asyncio.ensure_future(one(row)) for row in todo}
            try:
                while pending:
                    finished, pending = await asyncio.wait(pending, timeout=0.5)
                    for task in finished:
                        task.result()
                    report(ended)
                    watch()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)


async def _run_one(client: httpx.AsyncClient, url: str, row: Row) -> Row:
    identity = {k: row[k] for k in ("_ng_task_index", "_ng_rollout_index", "agent_ref")}
    try:
        answer = await client.post(f"{url}/run", json=row)
    except httpx.ConnectError as error:
        raise RunError(f"the agent at {url} does not answer: {error}", remedy="see Gym's log") from None
    except httpx.HTTPError as error:
        return identity | {"_ng_failure_class": type(error).__name__, "error": str(error)}
    if answer.status_code >= 400:
        return identity | {"_ng_failure_class": f"http_{answer.status_code}", "error": answer.text[:2000]}
    result = msgspec.json.decode(answer.content)
    if not isinstance(result, dict):
        return identity | {"_ng_failure_class": "not_object", "error": answer.text[:2000]}
    return result | identity


def _whole_lines(path: Path) -> list[Row]:
    """Reads what an earlier run wrote; a last line that it could not finish is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return [msgspec.json.decode(line) for line in whole.splitlines()]


def _key(row: Row) -> tuple[int, int]:
    return row["_ng_task_index"], row["_ng_rollout_index"]


def _seed(seed: int, task: int, repeat: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{repeat}".encode()).digest()[:4], "big")
