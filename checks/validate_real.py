"""The whole job on two environments of the real NeMo Gym, one of them with tool calls, and a server killed in it.

Run as: python checks/validate_real.py MODEL [--work runs/validate-real]

MODEL is SmolLM2-135M-Instruct with a chat template that knows tools; 'gymtrl gym setup' has to have installed both
servers. Rollouts of MODEL are collected, filtered and trained on; then both models are tried on held-out tasks. In the
middle of the candidate's turn the server with the tools is killed. No rollout may be lost, counted twice or scored as 0
for it, and calls of the candidate must have been read and executed. Which verdict comes out does not matter. What was
seen is written to checks/results/validate-real.json, the page to WORK/report.html. Ends with status 1 where something
does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil
import yaml
from office_tasks import AGENT, office_tasks

from gymtrl.demo.tasks import make_tasks
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.gym.install import require_installation
from gymtrl.gym.servers import find_running
from gymtrl.gym.settings import CollectSettings
from gymtrl.reports.comparison_page import write_page
from gymtrl.rollouts.reader import read_lines
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.run import train
from gymtrl.training.settings import TrainSftSettings
from gymtrl.validation.collection import collect_rollouts
from gymtrl.validation.session import gym_session
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import validate

RESULTS = Path(__file__).with_name("results") / "validate-real.json"
SERVERS = ("reasoning_gym", "workplace_assistant")
KILLED = "workplace_assistant"
SUMS, OFFICE_EACH = 100, 40
SAMPLING: dict[str, Any] = {"max_output_tokens": 56, "repeats": 2, "concurrency": 32}


def main() -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/validate-real"))
    arguments = parser.parse_args()
    installation = require_installation(None, SERVERS)
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tasks = work / "tasks.jsonl"
    sums = make_tasks(Path(installation.python))[:: 300 // SUMS]
    office = office_tasks(installation.site_packages, OFFICE_EACH)
    tasks.write_text("".join(json.dumps(task) + "\n" for task in [*sums, *office]))
    killed: list[str] = []
    start = time.monotonic()
    timed: dict[str, float] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "after" and total // 4 <= done < total and not killed:
            _server_process(work / "logs", KILLED).kill()
            killed.append(f"after {done} of {total} rollouts")

    def passed(stage: str) -> None:
        timed[stage] = round(time.monotonic() - start - sum(timed.values()), 1)
        print(f"{stage}: {timed[stage]:.0f} s", flush=True)

    with gym_session(SERVERS, work / "logs", progress=progress) as session:
        sampling = CollectSettings(**SAMPLING | {"repeats": 4})
        collect_rollouts(arguments.model, tasks, work / "collected", sampling, session=session)
        passed("collect")
        selection = FilterSettings(cluster="metadata.twin", validation=0.4, cap_per_task=2)
        filter_rollouts([work / "collected" / "rollouts.jsonl"], work / "filtered", selection)
        format_sft(work / "filtered", work / "dataset", FormatSftSettings(model=str(arguments.model)))
        train(work / "dataset", work / "trained", TrainSftSettings())
        passed("filter, format, train")
        heldout = work / "filtered" / "heldout_inputs.jsonl"
        trial = ValidateSettings(
            **SAMPLING, baseline=str(arguments.model), tasks=heldout, cluster="metadata.twin", seed=1
        )
        comparison = validate(work / "trained", work / "validation", trial, session=session)
        passed("validate")
    page = work / "report.html"
    write_page(comparison, page)

    after = work / "validation" / "after" / "rollouts.jsonl"
    rows: list[dict[str, Any]] = [msgspec.json.decode(line) for line in after.read_bytes().splitlines()]
    wanted = len(heldout.read_bytes().splitlines()) * trial.repeats
    places = Counter((row["_ng_task_index"], row["_ng_rollout_index"]) for row in rows)
    executed = _executed_calls(rows)
    counted = json.loads((work / "validation" / "manifest.json").read_text())["extra"]
    (candidate,) = comparison.candidates
    held = {
        f"{KILLED} was killed {', '.join(killed)}": len(killed) == 1,
        f"{wanted} rollouts of the candidate, each once": len(rows) == len(places) == wanted,
        "none counts as failed": (counted["failed_before"], counted["failed_after"]) == (0, 0),
        "no failure among the rows": not any("_ng_failure_class" in row for row in rows),
        "every line is read as a rollout": {line.verdict for line in read_lines([after])} <= {"ok", "context"},
        f"all rollouts are compared ({candidate.after.rollouts})": candidate.after.rollouts == wanted,
        f"{executed} of the candidate's tool calls were read and executed": executed > 0,
        "two environments are compared": len(candidate.environments) == len(SERVERS),
        "the page is written": page.stat().st_size > 0,
    }
    for what, holds in held.items():
        print("held    " if holds else "NOT HELD", what)
    print(comparison.verdict)
    found = {
        "gym": installation.version,
        "held": held,
        "verdict": comparison.verdict,
        "outcome": comparison.outcome,
        "environments": {effect.environment: _numbers(effect) for effect in candidate.environments},
        "seconds": timed,
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(held.values()) else 1


def _server_process(folder: Path, name: str) -> psutil.Process:
    """The process of one of Gym's servers; Gym lists the shell that started it."""
    port = yaml.safe_load((folder / "env.yaml").read_text())["head_server"]["port"]
    gym = find_running(f"http://127.0.0.1:{port}")
    assert gym is not None
    (shell,) = (server.pid for server in gym.servers if server.process_name == name)
    return next(p for p in psutil.Process(shell).children(recursive=True) if "app.py" in p.cmdline())


def _executed_calls(rows: list[dict[str, Any]]) -> int:
    """Calls of the policy that a tool answered without an error."""
    outputs = [item for row in rows if row["agent_ref"]["name"] == AGENT for item in row["response"]["output"]]
    return sum(item["type"] == "function_call_output" and "successfully" in item["output"] for item in outputs)


def _numbers(effect: Any) -> dict[str, Any]:
    return {
        "tasks": effect.difference.n,
        "before": effect.before.mean,
        "after": effect.after.mean,
        "difference": effect.difference.mean,
        "interval": [effect.difference.low, effect.difference.high],
        "outcome": effect.outcome,
    }


if __name__ == "__main__":
    sys.exit(main())
