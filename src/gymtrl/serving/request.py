"""What is asked of the engine, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gymtrl.serving.prefixes import Tokens
from gymtrl.serving.sampling import Sampling

DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate.

    Args:
        prompt_ids (`tuple[int, ...]`): Token ids of the rendered prompt, at least one.
        max_new_tokens (`int`): Tokens to generate at most, at least 1.
        sampling (`Sampling`, *optional*): How tokens are chosen.
        seed (`int`, *optional*): Makes sampling repeatable; without one every request is a fresh draw.
        stop (`tuple[str, ...]`, *optional*): Texts that end generation when they appear.
    """

    prompt_ids: Tokens
    max_new_tokens: int
    sampling: Sampling = DEFAULT_SAMPLING
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What was generated.

    Args:
        token_ids (`tuple[int, ...]`): Generated ids, the end-of-sequence token included when there was one.
        log_probs (`tuple[float, ...]`): Natural log-probability of each, see `gymtrl.serving.sampling.choose`.
        finish_reason (`"stop"` or `"length"`): End of sequence or stop text, or the token limit.
        ended (`bool`): Whether the last token is an end-of-sequence token, which is no part of the text.
        cached_tokens (`int`): Prompt tokens that were copied instead of computed for this request.
    """

    token_ids: Tokens
    log_probs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    ended: bool
    cached_tokens: int
