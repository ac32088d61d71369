"""Datasets rearranged so that they say nothing: what the controls of learning.py are trained on.

They are balanced by construction. Labels drawn by chance alone would, with a few dozen rows, often say a little.
Each function takes the columns of a dataset and the right answer to the question of each row, and returns the
columns that change.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from statistics import mean
from typing import Any

ANSWERS = ("Yes", "No")

Columns = dict[str, list[Any]]


def exchanged_completions(columns: Columns, answers: list[str], rng: random.Random) -> Columns:
    """SFT: every row gets the completion of another; the share of Yes is the same after questions of both kinds."""
    yes, no = (rng.sample(rows, len(rows)) for rows in (_where(answers, answer) for answer in ANSWERS))
    across = len(yes) - round(len(yes) ** 2 / len(answers))
    donors = dict(zip(yes[:across], no[:across], strict=True)) | dict(zip(no[:across], yes[:across], strict=True))
    for rest in (yes[across:], no[across:]):
        donors |= dict(zip(rest, rest[1:] + rest[:1], strict=True))
    starts = [next(at for at, label in enumerate(labels) if label != -100) for labels in columns["labels"]]
    changed: Columns = {"input_ids": [], "labels": []}
    for row, start in enumerate(starts):
        donor = donors[row]
        completion = columns["labels"][donor][starts[donor] :]
        changed["input_ids"].append(columns["input_ids"][row][:start] + completion)
        changed["labels"].append([-100] * start + completion)
    return changed


def exchanged_sides(columns: Columns, answers: list[str], rng: random.Random) -> Columns:
    """DPO: every other pair the other way round, within each right answer and rejected completion."""
    names = [f"{side}_{part}" for side in ("chosen", "rejected") for part in ("ids", "mask")]
    changed = {name: list(columns[name]) for name in names}
    for row in _shuffled_by(list(zip(answers, map(str, columns["rejected_ids"]), strict=True)), rng)[::2]:
        for part in ("ids", "mask"):
            for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
                changed[f"{side}_{part}"][row] = columns[f"{other}_{part}"][row]
    return changed


def dealt_labels(columns: Columns, answers: list[str], rng: random.Random) -> Columns:
    """KTO: as many good labels as before, evenly spread over each right answer and completion."""
    labels, good = list(columns["label"]), sum(columns["label"])
    cells = list(zip(answers, map(str, columns["completion_ids"]), strict=True))
    for place, row in enumerate(_shuffled_by(cells, rng)):
        labels[row] = (place + 1) * good // len(labels) > place * good // len(labels)
    return {"label": labels}


def dealt_rewards(columns: Columns, answers: list[str], rng: random.Random) -> Columns:
    """GRPO: the rewards of each group in another order.

    Of all orders that is taken which brings the advantages, summed over the groups so far for each right answer and
    completion, nearest to zero.
    """
    new = list(columns["reward"])
    cells = list(zip(answers, map(str, columns["completion_ids"]), strict=True))
    totals = dict.fromkeys(cells, 0.0)
    groups = list(dict.fromkeys(columns["group"]))
    for group in rng.sample(groups, len(groups)):
        rows = _where(columns["group"], group)
        rewards = [new[row] for row in rows]
        orders = list(itertools.permutations(rewards))
        rng.shuffle(orders)
        best, least = totals, math.inf
        for order in orders:
            summed = dict(totals)
            for row, reward in zip(rows, order, strict=True):
                summed[cells[row]] += reward - mean(rewards)
            away = sum(map(abs, summed.values()))
            if away < least:
                best, least = summed, away
                for row, reward in zip(rows, order, strict=True):
                    new[row] = reward
        totals = best
    return {"reward": new}


CONTROLS: dict[str, Callable[[Columns, list[str], random.Random], Columns]] = {
    "sft": exchanged_completions,
    "dpo": exchanged_sides,
    "kto": dealt_labels,
    "grpo": dealt_rewards,
}


def _where(values: list[str], value: str) -> list[int]:
    return [at for at, found in enumerate(values) if found == value]


def _shuffled_by(keys: list[tuple[str, str]], rng: random.Random) -> list[int]:
    """Row numbers, sorted by key and in random order where keys are equal."""
    return sorted(rng.sample(range(len(keys)), len(keys)), key=keys.__getitem__)
