"""The demo's tasks: one-digit arithmetic from reasoning_gym, asked with one worked turn before the question.

The prompt was chosen beforehand among four worked turns, on 80 two-digit questions, none of which can occur here: this
one gave well-formed answer tags in 20 % of 160 rollouts, the others in 4, 14 and 19 %. Without a worked turn the
untrained model hardly ever uses the tags.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from gymtrl.errors import RunError

AGENT = "reasoning_gym_simple_agent"
WORKED_TURN = (
    {"role": "user", "content": "State the final answer to the following arithmetic problem: 12 + 7 ="},
    {"role": "assistant", "content": "12 + 7 = 19 <answer>19</answer>"},
)
_ENOUGH = 3000  # drawn per kind, so that practically every one of the 300 distinct questions occurs


def make_tasks(gym_python: Path) -> list[dict[str, Any]]:
    """Returns Gym input rows for every one-digit question.

    `metadata.twin` names the kind and the unordered operands, so that a question and its commuted twin share a cluster.

    Args:
        gym_python (`Path`): Interpreter of Gym's environment, which has reasoning_gym.

    Raises:
        RunError: The generator failed.
    """
    return [task_row(entry) for entry in generate(gym_python, _ENOUGH, seed=0, digits=1)]


def generate(gym_python: Path, size: int, *, seed: int, digits: int) -> list[dict[str, Any]]:
    """Returns reasoning_gym entries (`question`, `answer`, `metadata`), generated in Gym's environment."""
    script = Path(__file__).with_name("generate.py")
    arguments = [str(gym_python), "-W", "ignore", str(script), str(size), str(seed), str(digits)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"reasoning_gym could not make tasks:\n{done.stderr[-1000:]}", remedy="run 'gymtrl gym setup'")
    return [json.loads(line) for line in done.stdout.splitlines()]


def task_row(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the Gym input row of a reasoning_gym entry."""
    metadata = dict(entry["metadata"])
    left, operator, right = metadata["expression"].split()
    metadata["twin"] = " ".join([metadata["source_dataset"], operator, *sorted([left, right])])
    question = {"role": "user", "content": entry["question"]}
    return {
        "responses_create_params": {"input": [*WORKED_TURN, question]},
        "question": entry["question"],
        "answer": entry["answer"],
        "metadata": metadata,
        "agent_ref": {"name": AGENT},
    }
