"""How the next token of every row is chosen.

A row draws one uniform number a step from its own generator and takes the token whose interval of the cumulative
distribution holds it (inverse transform sampling, exact). So a seeded request yields the same tokens whoever shares the
batch, except where rounding moves an interval's edge across the number drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY_BELOW = 1e-5
"""Temperatures below this one count as 0: dividing by them overflows, and they choose the best token anyway."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one request, with the defaults of the OpenAI API.

    Args:
        temperature (`float`, *optional*, defaults to 1.0): 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to 1.0): Probability mass to keep, in (0, 1].
        top_k (`int`, *optional*, defaults to 0): Tokens to keep; 0 keeps all.
        min_p (`float`, *optional*, defaults to 0.0): Smallest probability kept, relative to the largest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def choose(
    logits: torch.Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Chooses one token a row.

    Args:
        logits (`torch.Tensor`): `[rows, vocabulary]` float32.
        settings (`Sequence[Sampling]`): One a row.
        uniforms (`Sequence[float]`): One number in [0, 1) a row; greedy rows ignore theirs.

    Returns:
        `tuple[list[int], list[float]]`: Token ids, and their natural log-probabilities under the softmax of the logits
        divided by the temperature, before top-k, top-p and min-p cut anything off (greedy: undivided). That is the
        quantity that a trainer computes again from the same tokens at the same temperature.
    """
    groups: dict[Sampling, list[int]] = {}
    for row, setting in enumerate(settings):
        groups.setdefault(setting, []).append(row)
    tokens, log_probs = [0] * len(settings), [0.0] * len(settings)
    for setting, rows in groups.items():
        part = logits if len(groups) == 1 else logits[rows]
        chosen, chances = _choose_alike(part, setting, [uniforms[row] for row in rows])
        for row, token, chance in zip(rows, chosen, chances, strict=True):
            tokens[row], log_probs[row] = token, chance
    return tokens, log_probs


def _choose_alike(logits: torch.Tensor, setting: Sampling, uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """`choose` for rows that have the same settings, as almost all batches do."""
    # The warpers ask for input ids and do not look at them.
    no_ids = torch.empty((len(uniforms), 0), dtype=torch.long, device=logits.device)
    if setting.temperature < GREEDY_BELOW:
        chosen = logits.argmax(dim=-1, keepdim=True)
    else:
        logits = TemperatureLogitsWarper(float(setting.temperature))(no_ids, logits)
        chosen = _inverse_transform(_cut(setting)(no_ids, logits), uniforms)
    chances = logits.gather(-1, chosen) - logits.logsumexp(dim=-1, keepdim=True)
    return chosen.squeeze(-1).tolist(), chances.squeeze(-1).tolist()


def _cut(setting: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if setting.top_k > 0:
        warpers.append(TopKLogitsWarper(setting.top_k))
    if setting.top_p < 1:
        warpers.append(TopPLogitsWarper(setting.top_p))
    if setting.min_p > 0:
        warpers.append(MinPLogitsWarper(setting.min_p))
    return warpers


def _inverse_transform(scores: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    # float64: the sum over a large vocabulary in float32 would round rare tokens away.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * total
    # Rounding must not lift the target to the total, beyond the last token that has any weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)
