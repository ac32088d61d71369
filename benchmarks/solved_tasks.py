"""Prints solved tasks of reasoning_gym as rollouts of Gym, one JSON line each. Runs in Gym's environment.

Run as: python solved_tasks.py SIZE SEED
"""

from __future__ import annotations

import json
import sys

# Their questions have about 80 to 300 tokens, their answers 10 to 150.
KINDS = (
    "binary_matrix",
    "group_anagrams",
    "manipulate_matrix",
    "mini_sudoku",
    "number_sorting",
    "rotate_matrix",
    "spiral_matrix",
    "word_sorting",
)


def main(size: int, seed: int) -> None:
    """Prints `size` tasks of each of the KINDS in turn, with what an agent that solves them answers.

    Args:
        size (`int`): Tasks of each kind.
        seed (`int`): reasoning_gym's seed.
    """
    import reasoning_gym

    sets = [reasoning_gym.create_dataset(kind, size=size, seed=seed) for kind in KINDS]
    for index in range(size):
        for kind, data in zip(KINDS, sets, strict=True):
            print(json.dumps(rollout(kind, data[index]["question"], data[index]["answer"], index)))


def rollout(kind: str, question: str, answer: str, index: int) -> dict[str, object]:
    """One line of Gym's `rollouts.jsonl`."""
    text = {"type": "output_text", "text": answer, "annotations": []}
    message = {"id": f"msg_{kind}_{index}", "type": "message", "role": "assistant", "status": "completed"}
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "response": {
            "id": f"resp_{kind}_{index}",
            "created_at": 0.0,
            "model": "solved",
            "object": "response",
            "output": [message | {"content": [text]}],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        },
        "reward": 1.0,
        "task_name": kind,
    }


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
