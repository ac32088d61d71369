"""Which models the slot cache serves right: what their config says, and what a trial shows."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import PreTrainedModel

from gymtrl.errors import UserError
from gymtrl.serving.batch import forward_rows
from gymtrl.serving.cache import SlotCache

USE_VLLM = "serve it with vLLM: vllm serve MODEL"


def refuse_unsuitable(config: Any) -> None:
    """Refuses models that the slot cache does not fit, as far as their config tells.

    Raises:
        UserError: The model is an encoder-decoder, has layers other than full attention, or has rotary positions that
            change with the longest row in the batch.
    """
    name = f"model type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder", remedy="serve a decoder-only model")
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    # Configs with a switch keep a window size that is not in use; those with layer types have said it already.
    if getattr(config, "layer_types", None) or getattr(config, "use_sliding_window", True) is False:
        window = None
    length = getattr(config, "max_position_embeddings", None)
    if others:
        raise UserError(f"{name} has layers of other kinds: {', '.join(sorted(others))}", remedy=USE_VLLM)
    if window is not None and (length is None or window < length):
        raise UserError(f"{name} has sliding-window attention", remedy=USE_VLLM)
    if length is None or not isinstance(getattr(config, "num_attention_heads", None), int):
        raise UserError(f"{name} is no plain attention model", remedy=USE_VLLM)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise UserError(
            f"{name} has rotary positions of type {rope['rope_type']!r}, which depend on the batch",
            remedy=USE_VLLM,
        )


def check_slots(model: PreTrainedModel) -> None:
    """Compares a plain forward pass with one through the slot cache.

    Models that read positions from a padding mask, keep other state than keys and values, or attend in their own way
    would be served with wrong tokens and no error; this finds them before the first request.

    Raises:
        UserError: The two disagree, or the second does not run.
    """
    name = type(model).__name__
    draw = random.Random(0)
    rows = [[draw.randrange(model.config.vocab_size) for _ in range(length)] for length in (9, 5)]
    cache = SlotCache(model.config.num_hidden_layers)
    with torch.inference_mode():
        try:
            # Prompts of different lengths, a longer piece behind what is cached, then a single step.
            for begins, ends in (([0, 0], [4, 2]), ([4, 2], [8, 4]), ([8, 4], [9, 5])):
                pieces = [row[begin:end] for row, begin, end in zip(rows, begins, ends, strict=True)]
                stepped = forward_rows(model, cache, 0, pieces, begins)
        except Exception as error:
            raise UserError(
                f"{name} does not run with this server's cache: {type(error).__name__}: {error}", remedy=USE_VLLM
            ) from error
        for row, got in zip(rows, stepped, strict=True):
            plain = model(input_ids=torch.tensor([row], device=model.device)).logits[0, -1].float()
            difference = float((plain - got).norm() / plain.norm())
            # Loose enough for 16-bit weights, far below what a wrong mask or position does.
            if not difference < 0.05:
                raise UserError(
                    f"{name} gives other logits with this server's cache (relative difference {difference:.2g})",
                    remedy=USE_VLLM,
                )
