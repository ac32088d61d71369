"""What a careful person writes in an hour: paired means by prompt, and a bootstrap of their difference."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

DRAWS = 10_000


def paired_bootstrap(before: Path, after: Path) -> tuple[float, float, float, int]:
    """The mean difference over tasks, its 95 % percentile interval, and the number of tasks."""
    first, second = means(before), means(after)
    differences = np.array([second[key] - first[key] for key in sorted(first.keys() & second.keys())])
    rng = np.random.default_rng(0)
    n = len(differences)
    drawn = np.array([differences[rng.integers(n, size=n)].mean() for _ in range(DRAWS)])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(differences.mean()), float(low), float(high), n


def means(path: Path) -> dict[tuple[str, str], float]:
    """The mean reward of every task."""
    rewards: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            asked = json.dumps(row["responses_create_params"]["input"])
            rewards[row["agent_ref"]["name"], asked].append(row["reward"])
    return {key: sum(values) / len(values) for key, values in rewards.items()}
