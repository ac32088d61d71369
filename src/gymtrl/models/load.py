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


def weightless(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Builds a model on the meta device, which holds shapes and no weights.

    Args:
        config (`PretrainedConfig`): Of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model brings.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = model_class(config)
    with torch.device("meta"):
        if kind is AutoModelForCausalLM:
            return kind.from_config(config, trust_remote_code=trust_remote_code)
        return kind(config)
