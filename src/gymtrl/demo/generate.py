"""Prints reasoning_gym's one-digit arithmetic questions, one JSON object per line. Runs in Gym's environment.

Run as: python generate.py SIZE SEED DIGITS
"""

from __future__ import annotations

import json
import sys


def main(size: int, seed: int, digits: int) -> None:
    """Prints every distinct question among `size` generated ones of each kind.

    Args:
        size (`int`): Questions to generate per kind; with one digit there are 200 distinct chain_sum and 100 products.
        seed (`int`): reasoning_gym's seed.
        digits (`int`): Digits of each operand.
    """
    import reasoning_gym

    for kind in ("chain_sum", "products"):
        data = reasoning_gym.create_dataset(
            kind, size=size, seed=seed, min_terms=2, max_terms=2, min_digits=digits, max_digits=digits
        )
        for entry in {entry["question"]: entry for entry in data}.values():
            print(json.dumps(entry))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
