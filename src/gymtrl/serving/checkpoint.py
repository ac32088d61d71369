"""What a folder holds that is to be served: a model, or an adapter and the model that it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gymtrl.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """What is served.

    Attributes:
        model (`str`): Folder or hub id of a whole model.
        adapter (`Path`, *optional*): Folder of the LoRA adapter that goes onto it.
    """

    model: str
    adapter: Path | None = None

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer and chat template are: the adapter's own where it brings them."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if own else self.model


def find_checkpoint(folder: Path, *, model: str | None = None) -> Checkpoint:
    """Finds what is to be served in what training leaves.

    Args:
        folder (`Path`): A run folder, whose whole model is taken where it has one; a model folder; an adapter folder.
        model (`str`, *optional*): Folder or hub id of the model that an adapter belongs to; by default the one that
            the adapter names.

    Raises:
        UserError: There is nothing that can be served, or a model is given for what is one already.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", remedy="give the folder of a checkpoint")
    for whole in (folder / "model", folder):
        if (whole / "config.json").is_file():
            if model is not None:
                raise UserError(
                    f"{whole} is a whole model, and needs no other",
                    remedy="leave --model out, or give the folder of an adapter",
                )
            return Checkpoint(str(whole))
    for adapter in (folder, folder / "adapter"):
        if (adapter / "adapter_config.json").is_file():
            return Checkpoint(model or _base_of(adapter), adapter)
    raise UserError(
        f"{folder} has neither config.json nor adapter_config.json",
        remedy="give the folder of a checkpoint, of an adapter, or one that 'gymtrl train' wrote",
    )


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"the adapter {adapter} does not name the model that it was trained on",
            remedy="name it in adapter_config.json (base_model_name_or_path); 'serve' also takes --model",
        )
    if base.startswith(("/", ".", "~")) and not Path(base).is_dir():
        raise UserError(
            f"the adapter {adapter} was trained on {base}, which is not there",
            remedy="put its new place into adapter_config.json (base_model_name_or_path); 'serve' also takes --model",
        )
    return base
