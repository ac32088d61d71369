"""LoRA adapters: that one belongs to a model, how it is put onto it, and its rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.models.load import weightless

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def require_own_adapter(adapter: Path, base: str, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Checks that an adapter was trained on this model.

    Args:
        adapter (`Path`): Its folder.
        base (`str`): Folder or hub id of the model.
        config (`PretrainedConfig`): Of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model brings.

    Raises:
        UserError: It is no LoRA adapter, changes the base at random, names another model, or its weights fit no layer
            of this one.
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
    if (kind := own.get("peft_type", "LORA")) != "LORA":
        raise UserError(
            f"{adapter} is no LoRA adapter: its peft_type is {kind}", remedy="merge it into its model with PEFT first"
        )
    if str(start := own.get("init_lora_weights")).startswith("pissa_niter"):
        raise UserError(
            f"the adapter {adapter} began with '{start}', which changes the base at random each time that it is loaded",
            remedy="convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion)",
        )
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


def with_adapter(model: Any, adapter: Path) -> tuple[Any, list[str]]:
    """Puts an adapter onto a loaded model.

    Returns:
        `tuple[PeftModel, list[str]]`: The model with the adapter beside its weights, and the names of weights that are
        missing or found no layer: PEFT only warns of them.
    """
    from peft import PeftConfig, PeftModel

    adapted = PeftModel(model, PeftConfig.from_pretrained(str(adapter)))
    found = adapted.load_adapter(str(adapter), adapted.active_adapter)
    return adapted, [*found.missing_keys, *found.unexpected_keys]


def adapter_rank(adapter: Path) -> int:
    """Reads the rank of an adapter from its folder."""
    return int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])


def vllm_rank(rank: int) -> int:
    """Returns the value of vLLM's `--max-lora-rank` that an adapter of `rank` needs: the next one that it knows.

    vLLM's own default is 16, and it refuses an adapter above that.
    """
    return next((known for known in _VLLM_RANKS if known >= rank), rank)
