"""The model that is to be trained, before it is loaded: that its weights are whole, and that an adapter is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import model_file
from gymtrl.models.load import model_class, weightless
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


def require_own_adapter(adapter: Path, base: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Checks that an adapter was trained on this model.

    Args:
        adapter (`Path`): Its folder.
        base (`str`): Folder or hub id of the model.
        config (`PretrainedConfig`): Of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model brings.

    Raises:
        UserError: It is no LoRA adapter, names another model, or its weights fit no layer of this one.
    """
    from safetensors import safe_open

    settings_file, weights_file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    try:
        own = json.loads(settings_file.read_text(encoding="utf-8"))
        with safe_open(weights_file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter} is no LoRA adapter: {error}", remedy="give the folder 'adapter' of a run that trained one"
        ) from None
    named = str(own.get("base_model_name_or_path") or "")
    if not _same_model(named, base):
        raise UserError(
            f"the adapter {adapter} was trained on {named or 'a model that it does not name'}, not on {base}",
            remedy=f"give --model {named}, or an adapter of {base}",
        )
    model = weightless(config, trust_remote_code=trust_remote_code)
    layers = {name: weight.shape for name, weight in model.named_parameters()}
    for name, shape in shapes.items():
        layer, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        wide = layers.get(f"{layer}.weight")
        fits = wide is not None and shape[side.startswith("A")] == wide[side.startswith("A")]
        if side and not side.startswith("embedding") and not fits:
            raise UserError(
                f"the adapter {adapter} does not fit {base}: {layer} is {list(wide) if wide else 'not there'}, and the "
                f"adapter's weight {shape}",
                remedy=f"give the model that it was trained on ({named})",
            )


def _same_model(named: str, base: str) -> bool:
    """Whether two names may be of one model: many folders are called `model`, and a hub model may lie in a folder."""
    if Path(named).is_dir() and Path(base).is_dir():
        return Path(named).samefile(base)
    return Path(named).name == Path(base).name


def hub_revision(base: str) -> str | None:
    """The commit of a model in the hub's cache; `None` of another folder."""
    from transformers.utils.hub import extract_commit_hash

    found: str | None = extract_commit_hash(str(model_file(base, "config.json")), None)
    return found


def adapter_rank(adapter: Path) -> int:
    """Reads the rank of an adapter from its folder."""
    return int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
