"""Prints reasoning_gym's questions about inverted premises, one JSON object per line. Runs in Gym's environment.

Run as: python learning_tasks.py SIZE SEED
"""

from __future__ import annotations

import json
import sys


def main(size: int, seed: int) -> None:
    """Prints every distinct question among `size` generated ones.

    Made like this, the answer is Yes where the conclusion begins with "Some", and No where it begins with "All" or
    "No".

    Args:
        size (`int`): Questions to generate.
        seed (`int`): reasoning_gym's seed.
    """
    import reasoning_gym

    data = reasoning_gym.create_dataset(
        "syllogism",
        size=size,
        seed=seed,
        invalid_ratio=0.5,
        inversion_probability=1.0,
        allow_no=False,
        allow_some_not=False,
    )
    for entry in {entry["question"]: entry for entry in data}.values():
        print(json.dumps(entry))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
