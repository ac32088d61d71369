"""The model that is to be trained, before it is loaded: that its weights are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import model_file
from gymtrl.models.load import model_class
from gymtrl.training.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_weights(base: str, config: PretrainedConfig) -> None:
    """Checks that the weights of a model are there, whole, and of the shapes that its configuration tells.

    Weights that are missing would be drawn at random, and only a log would say so. None of them is read: the model is
    built on the meta device.

    Args:
        base (`str`): Folder or hub id.
        config (`PretrainedConfig`): Its configuration. Weights in a quantized form, and those that code from the
            model's own repository loads, are left to be checked by who loads them.

    Raises:
        UserError: Naming the first of what is missing.
    """
    from safetensors import SafetensorError

    if getattr(config, "quantization_config", None) is not None or getattr(config, "auto_map", None):
        return
    remedy = f"copy the model into {base} anew, or train another with --model"
    try:
        with quiet():
            _, found = model_class(config).from_pretrained(
                base, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of {base} cannot be read: {error}", remedy=remedy) from error
    if found["mismatched_keys"]:
        name, saved, wanted = sorted(found["mismatched_keys"])[0]
        raise UserError(
            f"{base}: config.json does not belong to the weights: {name} is {list(saved)}, and by config.json it is "
            f"{list(wanted)}",
            remedy=remedy,
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise UserError(f"{base} lacks {len(names)} of its weights, such as {names[0]}", remedy=remedy)


def hub_revision(base: str) -> str | None:
    """The commit of a model in the hub's cache; `None` of another folder."""
    from transformers.utils.hub import extract_commit_hash

    found: str | None = extract_commit_hash(str(model_file(base, "config.json")), None)
    return found
