"""A version of NeMo Gym that is not the pinned one: collects and validates through it, for real.

Run as: python checks/gym_contract.py MODEL --home FOLDER [--work runs/gym-contract]

FOLDER is where 'gymtrl gym setup --home' put that Gym. Its servers are started, a model is served by the endpoint of
this package, two rollouts of each of six tasks are collected by Gym's own command, and the model is validated against
itself, which must show nothing. Every line that Gym wrote must be read as a rollout with the tokens that the policy
produced. Ends with status 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from gymtrl.demo.tasks import make_tasks
from gymtrl.gym.install import require_installation
from gymtrl.gym.settings import CollectSettings
from gymtrl.rollouts.reader import read_lines
from gymtrl.validation.session import gym_session
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import validate

SERVER = "reasoning_gym"
TASKS = 6
REPEATS = 2
TOKENS = 16


def main() -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/gym-contract"))
    arguments = parser.parse_args()
    installation = require_installation(arguments.home, [SERVER])
    print(f"nemo-gym {installation.version} on {installation.python}")
    work: Path = arguments.work
    if work.exists() and not (work / "tasks.jsonl").is_file():
        parser.error(f"{work} is no folder of an earlier check")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tasks = make_tasks(Path(installation.python))[:TASKS]
    task_file = work / "tasks.jsonl"
    task_file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    start = time.monotonic()
    with gym_session(SERVER, work / "logs", gym_home=arguments.home) as session:
        out = work / "rollouts.jsonl"
        settings = CollectSettings(repeats=REPEATS, max_output_tokens=TOKENS)
        collection = session.collect(arguments.model, tasks, out, settings, name="rollouts")
        collected = time.monotonic() - start
        same = ValidateSettings(
            baseline=str(arguments.model),
            tasks=task_file,
            repeats=REPEATS,
            max_output_tokens=TOKENS,
            leak_check=False,
        )
        comparison = validate(arguments.model, work / "validation", same, session=session)
    lines = list(read_lines([out, *work.glob("validation/*/rollouts.jsonl")]))
    by_command = (work / "logs" / "collect.log").read_text(errors="replace").count("Finished rollout collection")
    wanted = TASKS * REPEATS
    held = {
        f"{wanted} rollouts collected, none failed": (collection.collected, collection.failed) == (wanted, 0),
        "three collections ended by Gym's own command": by_command == 3,
        f"{3 * wanted} lines read as rollouts": [line.verdict for line in lines] == ["ok"] * 3 * wanted,
        "each with the policy's tokens": all(line.rollout and line.rollout.recorded for line in lines),
        f"{TASKS} tasks compared, nothing shown: {comparison.verdict}": comparison.outcome
        not in ("improved", "regressed"),
    }
    for what, holds in held.items():
        print("held    " if holds else "NOT HELD", what)
    print(f"collected after {collected:.0f} s, validated after {time.monotonic() - start:.0f} s")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
