"""Comparing two collections: gymtrl against a plain script (`compare_baseline.py`) that only has the paired bootstrap.

Run as: python benchmarks/compare.py [--tasks 5000] [--repeats 8] [--rounds 3] [--out benchmarks/results/compare.json]

Two files are made in a temporary folder, with rows of about 2 kB: a system prompt, a question and an answer, and in
every fourth task a tool call and its result. Rewards are 0 and 1; each task has a chance of its own before and after.

    ours        `compare_files`: verdicts of every line, keys, pairing, the cluster-robust interval, 10,000 bootstraps,
                sign flips, pass@k, costs and flips
    baseline    `json.loads` of every line, the mean reward of every (agent, prompt), and 10,000 paired bootstraps of
                the difference with numpy; nothing else

Each runs in a process of its own, in turn, on files that have just been read, with one thread. Of several rounds the
one with the least CPU time counts, as other work on the machine only ever slows a round down; all are kept. `cpu_s` is
the CPU time of the whole process, imports included. Both find the same mean difference (`same_difference`), and
intervals whose limits agree within `interval_gap`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

Result = dict[str, Any]
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")}
WORDS = ("the sum of", "both numbers", "is carried over", "and then", "added to", "what was left", "of the one before")
TOOL = {
    "type": "function",
    "name": "calculate",
    "description": "Evaluates an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    "strict": True,
}


def write_collection(path: Path, tasks: int, repeats: int, seed: int, gain: float) -> None:
    """Writes the rollouts of one side; the tasks are the same for every seed."""
    chances = random.Random(0)
    rng = random.Random(seed)
    with path.open("w") as out:
        for task in range(tasks):
            chance = chances.random() + gain * rng.random()
            for repeat in range(repeats):
                out.write(json.dumps(rollout(task, repeat, float(rng.random() < chance), rng)) + "\n")


def rollout(task: int, repeat: int, reward: float, rng: random.Random) -> dict[str, Any]:
    """A row as Gym writes it."""
    name = f"{rng.getrandbits(64):016x}"
    text = " ".join(rng.choices(WORDS, k=75 if task % 4 else 30))
    message = {
        "id": f"msg_{name}",
        "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}],
        "role": "assistant",
        "status": "completed",
        "type": "message",
    }
    call = {"arguments": json.dumps({"expression": f"{task} + {task}"}), "call_id": f"call_{name}", "name": "calculate"}
    call |= {"type": "function_call", "id": f"fc_{name}", "status": "completed"}
    answer = {"call_id": f"call_{name}", "output": json.dumps({"result": 2 * task}), "type": "function_call_output"}
    tools = [] if task % 4 else [TOOL]
    asked = (
        f"Question {task}: what is {task} + {task}? Show each step, and put the number into <answer> tags at the end."
    )
    return {
        "responses_create_params": {
            "input": [
                {"role": "system", "content": "You are a careful assistant. " * 4},
                {"role": "user", "content": asked},
            ],
            "tools": tools,
            "temperature": 1.0,
            "max_output_tokens": 512,
        },
        "response": {
            "id": f"resp_{name}",
            "created_at": 1.0,
            "model": "policy",
            "object": "response",
            "output": [message] if task % 4 else [call, answer, message],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": tools,
            "usage": {"input_tokens": 90, "output_tokens": len(text) // 4, "total_tokens": 90 + len(text) // 4},
        },
        "reward": reward,
        "extracted_answer": str(2 * task),
        "_ng_task_index": task,
        "_ng_rollout_index": repeat,
        "agent_ref": {"type": "responses_api_agents", "name": "calculator_simple_agent"},
    }


def ours(before: Path, after: Path) -> Result:
    """The mean difference with its bootstrap interval, and what else there is."""
    from gymtrl.comparison.compare import compare_files

    comparison = compare_files([before], [after])
    effect = comparison.candidates[0].overall
    low, high = effect.bootstrap
    found: Result = {"mean": effect.difference.mean, "low": low, "high": high, "tasks": effect.difference.n}
    return found | {"rollouts": comparison.before.rollouts, "verdict": comparison.verdict}


def baseline(before: Path, after: Path) -> Result:
    """The mean difference with its bootstrap interval."""
    from compare_baseline import paired_bootstrap

    mean, low, high, tasks = paired_bootstrap(before, after)
    return {"mean": mean, "low": low, "high": high, "tasks": tasks}


SIDES = {"ours": ours, "baseline": baseline}


def measure_here(name: str, before: Path, after: Path) -> Result:
    """Does the work of one side in this process."""
    found = SIDES[name](before, after)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"cpu_s": used.ru_utime + used.ru_stime, "peak_rss_mb": used.ru_maxrss / 1024}


def measure(name: str, before: Path, after: Path) -> Result:
    """Does it in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, str(before), str(after)]
    done = subprocess.run(command, env=os.environ | THREADS, stdout=subprocess.PIPE, check=True, text=True)
    result: Result = json.loads(done.stdout)
    print(f"{name:10} {result['cpu_s']:6.2f} s CPU  {result['peak_rss_mb']:6.0f} MB", flush=True)
    return result


def benchmark(tasks: int, repeats: int, rounds: int) -> Result:
    """Makes the files and measures both sides in turn."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.jsonl", Path(folder) / "after.jsonl"
        write_collection(before, tasks, repeats, seed=1, gain=0.0)
        write_collection(after, tasks, repeats, seed=2, gain=0.02)
        size = before.stat().st_size + after.stat().st_size
        runs: dict[str, list[Result]] = {name: [] for name in SIDES}
        for _ in range(rounds):
            for name in SIDES:
                runs[name].append(measure(name, before, after))
    best = {name: min(results, key=lambda run: float(run["cpu_s"])) for name, results in runs.items()}
    mine, theirs = best["ours"], best["baseline"]
    return {
        "tasks": tasks,
        "repeats": repeats,
        "rows": 2 * tasks * repeats,
        "bytes_a_row": size / (2 * tasks * repeats),
        **{name: run | {"cpu_s_of_rounds": [r["cpu_s"] for r in runs[name]]} for name, run in best.items()},
        "cpu_share_of_baseline": mine["cpu_s"] / theirs["cpu_s"],
        "same_difference": abs(mine["mean"] - theirs["mean"]) < 1e-12 and mine["tasks"] == theirs["tasks"],
        "interval_gap": max(abs(mine[limit] - theirs[limit]) for limit in ("low", "high")),
        "within_5_s": mine["cpu_s"] <= 5.0,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("numpy", "scipy", "msgspec")},
    }


def main() -> None:
    """Measures, prints, and keeps the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, metavar=("SIDE", "BEFORE", "AFTER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        side, before, after = given.measure
        print(json.dumps(measure_here(side, Path(before), Path(after))))
        return
    result = benchmark(given.tasks, given.repeats, given.rounds)
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")
    if not (result["within_5_s"] and result["same_difference"]):
        raise SystemExit("the comparison took more than 5 s of CPU time, or found another difference than the baseline")


if __name__ == "__main__":
    main()
