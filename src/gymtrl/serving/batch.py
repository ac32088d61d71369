"""Forward passes over rows of a slot cache: mixed lengths, one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gymtrl.serving.cache import SlotCache

MAX_FORWARD_TOKENS = 4096
"""Tokens of one forward pass, padding included. Bounds the memory of activations and masks."""

MAX_MASK_CELLS = 16 * 2**20
"""Query-key pairs of one forward pass, rows included: 64 MB of float32 mask."""


def forward_rows(
    model: PreTrainedModel,
    cache: SlotCache,
    first: int,
    suffixes: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> torch.Tensor:
    """Feeds the new tokens of consecutive rows and returns the logits after the last of each. Call in inference mode.

    Rows may bring different numbers of tokens; shorter ones are padded on the left, so that every row ends in the last
    position. The keys of padding go to the column past the row's end, where the row's own next token overwrites them.

    Args:
        model (`PreTrainedModel`): A causal language model with full attention in every layer.
        cache (`SlotCache`): Holds `starts[i]` tokens of row `first + i`.
        first (`int`): Slot of the first row.
        suffixes (`Sequence[Sequence[int]]`): New token ids, at least one a row.
        starts (`Sequence[int]`): Tokens of each row that the cache holds already.

    Returns:
        `torch.Tensor`: `[rows, vocabulary]` float32.
    """
    rows, longest = len(suffixes), max(map(len, suffixes))
    width = max(start + len(suffix) for start, suffix in zip(starts, suffixes, strict=True))
    per_pass = min(MAX_FORWARD_TOKENS, max(MAX_MASK_CELLS // width, 1))
    if rows > 1 and rows * longest > per_pass:
        # Few rows at a time first, then a long row in pieces: a piece of many rows is mostly padding.
        half = rows // 2
        return torch.cat(
            [
                forward_rows(model, cache, first, suffixes[:half], starts[:half]),
                forward_rows(model, cache, first + half, suffixes[half:], starts[half:]),
            ]
        )
    pads = [longest - len(suffix) for suffix in suffixes]
    device = model.device
    ids = torch.tensor(
        [[0] * pad + list(suffix) for pad, suffix in zip(pads, suffixes, strict=True)],
        device=device,
    )
    step = torch.arange(longest, device=device)[None, :]
    pad = torch.tensor(pads, device=device)[:, None]
    start = torch.tensor(starts, device=device)[:, None]
    positions = start + step - pad
    columns = torch.where(step < pad, start + longest - pad, positions)
    positions = torch.where(step < pad, 0, positions)
    cache.reserve(first + rows, width + 1)
    for begin in range(0, longest, per_pass):
        piece = slice(begin, min(begin + per_pass, longest))
        seen = int(positions[:, piece].max()) + 1
        cache.aim(first, columns[:, piece], seen)
        hidden = torch.arange(seen, device=device) > positions[:, piece, None]
        # Additive, since eager attention adds it; the lowest number instead of -inf, since a row of -inf makes NaN.
        mask = torch.zeros(hidden.shape, dtype=model.dtype, device=device)
        mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        output = model(
            input_ids=ids[:, piece],
            attention_mask=mask[:, None],
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: torch.Tensor = output.logits[:, -1].float()
    return logits
