"""Rows of recorded groups: their advantages, computed once from the whole dataset, and the log-probabilities they need.

A row is a rollout that was sampled once: `prompt_ids`, `completion_ids`, `completion_mask`, `log_probs`, `reward` and
its `group`. Groups may be of different sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, List, Value
from torch import Tensor
from transformers import AutoConfig
from trl.trainer.utils import pad

from gymtrl.errors import UserError
from gymtrl.models.load import model_class
from gymtrl.training.tokens import token_columns

COLUMNS = ["prompt_ids", "completion_ids", "completion_mask", "log_probs", "advantage", "length"]
"""What a row that is trained on holds; `length` is for samplers that go by it."""

_SCALE_EPSILON = 1e-4  # as in TRL
_POSITIONS = 256  # whose logits are held in float32 at once


@dataclass(frozen=True)
class GroupRows:
    """The rows of a split that can be learned from.

    Attributes:
        rows (`Dataset`): With the columns of `COLUMNS`, in their order.
        groups (`int`): Groups that the split holds.
        without_variance (`int`): Groups left out because their rewards do not differ.
        without_reward (`int`): Rows left out because they have no reward.
    """

    rows: Dataset
    groups: int
    without_variance: int
    without_reward: int


def group_rows(dataset: Dataset, split: str, *, baseline_shift: float, scale_rewards: str) -> GroupRows:
    """Checks the rows of a split and gives each its advantage.

    Args:
        dataset (`Dataset`): Rows of recorded groups.
        split (`str`): Its name, for messages.
        baseline_shift (`float`): Added to a group's mean reward to make its baseline.
        scale_rewards (`str`): `none`, or `group` to divide by the standard deviation of the group.

    Returns:
        `GroupRows`: Rows without a reward and groups without variance are left out; neither has anything to learn.

    Raises:
        UserError: Rows that cannot be trained on as they are, log-probabilities that are missing, or nothing left.
    """
    rows = token_columns(dataset, split, ("completion",), ("group", "reward"), None)
    if "log_probs" not in dataset.column_names:
        raise UserError(f"the {split} rows have no column 'log_probs'", remedy=_RECOMPUTE)
    rows = dataset.select_columns([*rows.column_names, "log_probs"])
    groups, rewards = rows["group"][:], rows["reward"][:]
    found = advantages(groups, rewards, baseline_shift=baseline_shift, scale_rewards=scale_rewards)
    used = [at for at, advantage in enumerate(found) if advantage is not None]
    if not used:
        raise UserError(
            f"no group of the {split} rows has rewards that differ: there is nothing to learn from",
            remedy="collect more rollouts a task, or tasks that are solved now and then",
        )
    rows = (
        rows.remove_columns(["group", "reward"])
        .add_column("advantage", [math.nan if one is None else one for one in found])
        .add_column("length", _lengths(rows))
        .select(used)
    )
    _check_log_probs(rows, split)
    return GroupRows(
        rows=rows,
        groups=len(set(groups)),
        without_variance=len(set(groups)) - len({groups[at] for at in used}),
        without_reward=sum(not _is_reward(reward) for reward in rewards),
    )


def advantages(
    groups: Sequence[str], rewards: Sequence[float | None], *, baseline_shift: float, scale_rewards: str = "none"
) -> list[float | None]:
    """Reward minus baseline, where the baseline is the group's mean reward plus `baseline_shift`.

    Args:
        groups (`Sequence[str]`): The group of each row.
        rewards (`Sequence[float | None]`): The reward of each row. `None` counts in no mean.
        baseline_shift (`float`): Below 0, the baseline lies below the mean and what is good weighs more.
        scale_rewards (`str`, *optional*, defaults to `"none"`): `group` divides by the group's standard deviation.

    Returns:
        `list[float | None]`: `None` where the row has no reward, or the rewards of its group do not differ.
    """
    members = defaultdict(list)
    for at, (group, reward) in enumerate(zip(groups, rewards, strict=True)):
        if _is_reward(reward):
            members[group].append(at)
    found: list[float | None] = [None] * len(groups)
    for places in members.values():
        values = np.array([rewards[at] for at in places], dtype=float)
        if values.min() == values.max():
            continue
        scale = values.std(ddof=1) + _SCALE_EPSILON if scale_rewards == "group" else 1.0
        for at, value in zip(places, (values - values.mean() - baseline_shift) / scale, strict=True):
            found[at] = float(value)
    return found


def with_blank(rows: Dataset) -> Dataset:
    """Adds a last row that nothing is learned from, for processes that would else have one row less than others."""
    from datasets import concatenate_datasets

    blank = {"prompt_ids": [0], "completion_ids": [0], "completion_mask": [0], "log_probs": [0.0], "advantage": 0.0}
    return concatenate_datasets([rows, Dataset.from_list([blank | {"length": 2}], features=rows.features)])


class GroupCollator:
    """Puts rows into the batches that `GRPOTrainer` computes its losses from.

    Args:
        pad_token_id (`int`): Fills prompts on the left and completions on the right.
        pad_to_multiple_of (`int`, *optional*): Lengths are padded to a multiple of this.
        processes (`int`): How many processes train.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None, processes: int) -> None:
        self._pad_token_id = pad_token_id
        self._multiple = pad_to_multiple_of
        self._processes = processes

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
        completions = [torch.tensor(row["completion_ids"]) for row in rows]
        masks = [torch.tensor(row["completion_mask"], dtype=torch.long) for row in rows]
        # As if this batch were all; in training, counts of the whole optimizer step take their place.
        tokens = sum(int(mask.sum()) for mask in masks)
        return {
            "prompt_ids": self._pad(prompts, self._pad_token_id, "left"),
            "prompt_mask": self._pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
            "completion_ids": self._pad(completions, self._pad_token_id),
            "completion_mask": self._pad([torch.ones_like(ids) for ids in completions], 0),
            "tool_mask": self._pad(masks, 0),
            "old_per_token_logps": self._pad([torch.tensor(row["log_probs"]) for row in rows], 0.0),
            "advantages": torch.tensor([row["advantage"] for row in rows]),
            "num_items_in_batch": torch.tensor(float(tokens * self._processes)),
        }

    def _pad(self, values: list[Tensor], filler: float, side: str = "right") -> Tensor:
        padded: Tensor = pad(values, padding_value=filler, padding_side=side, pad_to_multiple_of=self._multiple)
        return padded


def recompute_log_probs(
    model: Any, dataset: Dataset, *, temperature: float = 1.0, trust_remote_code: bool = False
) -> Dataset:
    """Fills in `log_probs` where nothing was recorded.

    Args:
        model (`str` or `PreTrainedModel`): The model that the rollouts were collected with, before any training. A
            folder or name is loaded only where something is missing.
        dataset (`Dataset`): Rows of recorded groups.
        temperature (`float`, *optional*, defaults to 1.0): What the rollouts were sampled with.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that a model to be loaded brings.

    Returns:
        `Dataset`: The same rows; `log_probs` are natural, and 0 where `completion_mask` is.
    """
    recorded = dataset["log_probs"][:] if "log_probs" in dataset.column_names else [None] * len(dataset)
    if None not in recorded:
        return dataset
    if isinstance(model, str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = model_class(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code))
        model = kind.from_pretrained(model, dtype="float32", trust_remote_code=trust_remote_code).to(device)
    was_training = model.training
    model.eval()
    tokens = dataset.select_columns(["prompt_ids", "completion_ids", "completion_mask"])
    filled = [
        known if known is not None else _log_probs(model, row, temperature)
        for known, row in zip(recorded, tokens, strict=True)
    ]
    model.train(was_training)
    rest = dataset.remove_columns([name for name in ("log_probs",) if name in dataset.column_names])
    return rest.add_column("log_probs", filled, feature=List(Value("float64")))


_RECOMPUTE = (
    "have them filled in by gymtrl.recompute_log_probs(model, dataset), with the model that collected the rollouts"
)


def _log_probs(model: Any, row: dict[str, Any], temperature: float) -> list[float]:
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]], device=model.device)
    answer = ids[0, len(row["prompt_ids"]) :]
    with torch.no_grad():
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
    parts = zip(logits.split(_POSITIONS), answer.split(_POSITIONS), strict=True)
    odds = [
        (part.float() / temperature).log_softmax(-1).gather(-1, said.unsqueeze(-1)).squeeze(-1) for part, said in parts
    ]
    found: list[float] = (torch.cat(odds).cpu() * torch.tensor(row["completion_mask"])).tolist()
    return found


def _is_reward(reward: float | None) -> bool:
    return reward is not None and math.isfinite(reward)


def _lengths(rows: Dataset) -> list[int]:
    lengths = []
    for table in rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(batch_size=1000):
        total = pc.add(*(pc.list_value_length(column) for column in table.columns))
        lengths += total.to_pylist()
    return lengths


def _check_log_probs(rows: Dataset, split: str) -> None:
    missing = 0
    for table in rows.select_columns(["completion_ids", "log_probs"]).with_format("arrow").iter(batch_size=1000):
        ids, log_probs = (table.column(name).combine_chunks() for name in ("completion_ids", "log_probs"))
        missing += log_probs.null_count
        fits = pc.equal(pc.list_value_length(ids), pc.list_value_length(log_probs))
        if not pc.all(pc.fill_null(fits, True)).as_py() or not _finite(pc.list_flatten(log_probs)):
            raise UserError(
                f"the {split} rows have log_probs that are no numbers or do not fit their completion_ids",
                remedy="make the dataset again",
            )
    if missing:
        raise UserError(f"{missing} of {len(rows)} {split} rows have no recorded log_probs", remedy=_RECOMPUTE)


def _finite(values: pa.Array) -> bool:
    return bool(pc.all(pc.is_finite(values.cast(pa.float64())), min_count=0).as_py()) and not values.null_count
