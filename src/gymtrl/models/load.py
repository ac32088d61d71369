"""The class that a model is loaded by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that a configuration names, as TRL's trainers take it; else `AutoModelForCausalLM`."""
    import transformers

    named = (config.architectures or [""])[0]
    return getattr(transformers, named, transformers.AutoModelForCausalLM)
