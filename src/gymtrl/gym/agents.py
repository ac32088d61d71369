"""Asking Gym's agents for rollouts over their `/run`, each with a time-out and attempts of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from gymtrl.errors import RunError
from gymtrl.gym.settings import CollectSettings

Row = dict[str, Any]
_PAUSE_SECONDS = 2.0  # times the attempts so far: a server under load needs a moment
_UNREACHABLE = httpx.ConnectError.__name__


def ask_agents(
    urls: dict[str, str],
    rows: Sequence[Row],
    out: Path,
    failures: Path,
    settings: CollectSettings,
    *,
    watch: Callable[[], None],
    report: Callable[[int], None],
) -> None:
    """Appends a rollout per row to `out`, and every attempt that failed, with its reason, to `failures`.

    Args:
        urls (`dict[str, str]`): Where each agent answers, by its name.
        rows (`Sequence[Row]`): Requests.
        out (`Path`): The rollouts file.
        failures (`Path`): The file of failed attempts.
        settings (`CollectSettings`): Attempts, time-out, concurrency.
        watch (`Callable[[], None]`): Called about twice a second; what it raises ends the collection.
        report (`Callable[[int], None]`): Called with the rows that are done.

    Raises:
        RunError: An agent does not answer.
    """
    asyncio.run(_ask_all(urls, rows, out, failures, settings, watch, report))


async def _ask_all(
    urls: dict[str, str],
    rows: Sequence[Row],
    out: Path,
    failures: Path,
    settings: CollectSettings,
    watch: Callable[[], None],
    report: Callable[[int], None],
) -> None:
    gate = asyncio.Semaphore(settings.concurrency)
    ended = 0
    limits = httpx.Limits(max_connections=settings.concurrency)
    async with httpx.AsyncClient(timeout=settings.timeout, limits=limits, trust_env=False) as client:
        with out.open("ab") as good, failures.open("ab") as bad:

            async def one(row: Row) -> None:
                nonlocal ended
                async with gate:
                    for attempt in range(settings.attempts):
                        await asyncio.sleep(_PAUSE_SECONDS * attempt)
                        result = await _ask(client, urls[row["agent_ref"]["name"]], row)
                        # As Gym tells them; its second mark is of rollouts to be kept out of every file.
                        failure = result.get("_ng_failure_class")
                        failed = failure is not None or bool(result.get("_ng_no_persist"))
                        file = bad if failed else good
                        # Buffered: a write to a full disk may be short, and the rest of a line comes before the next.
                        file.write(msgspec.json.encode(result) + b"\n")
                        file.flush()
                        if not failed:
                            break
                    else:
                        if failure == _UNREACHABLE:
                            told = f"the agent '{row['agent_ref']['name']}' does not answer: {result['error']}"
                            raise RunError(told, remedy="see Gym's log")
                ended += 1

            pending = {asyncio.ensure_future(one(row)) for row in rows}
            try:
                while pending:
                    finished, pending = await asyncio.wait(pending, timeout=0.5)
                    report(ended)
                    watch()  # first: what failed because Gym died is no failure
                    for task in finished:
                        task.result()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)


async def _ask(client: httpx.AsyncClient, url: str, row: Row) -> Row:
    identity = {k: row[k] for k in ("_ng_task_index", "_ng_rollout_index", "agent_ref")}
    try:
        answer = await client.post(f"{url}/run", json=row)
    except httpx.HTTPError as error:
        return identity | {"_ng_failure_class": type(error).__name__, "error": str(error)}
    if answer.status_code >= 400:
        return identity | {"_ng_failure_class": f"http_{answer.status_code}", "error": answer.text[:2000]}
    try:
        result = msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        return identity | {"_ng_failure_class": "not_an_object", "error": f"{error}: {answer.text[:2000]}"}
    return result | identity
