"""What identifies a tokenizer and its chat template, so that tokens are never fed to a model they were not made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Fingerprint:
    """What the tokens of a row depend on.

    Attributes:
        tokenizer (`str`): SHA-256 (hex) of vocabulary, merges, normalisation and special tokens; the layout of
            the files does not matter.
        chat_template (`str`): SHA-256 (hex) of the chat template's text, `""` where there is none.
    """

    tokenizer: str
    chat_template: str

    def as_dict(self) -> dict[str, str]:
        """The two hashes as a JSON-able mapping."""
        return asdict(self)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Identifies `tokenizer` by what it does to a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # A trainer leaves its own padding and truncation behind; neither changes the tokens of one whole row.
        for volatile in ("padding", "truncation"):
            state.pop(volatile, None)
    else:
        state = {"vocab": tokenizer.get_vocab()}
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    template = chat_template_of(tokenizer)
    return Fingerprint(
        tokenizer=_sha256(json.dumps(state, sort_keys=True, ensure_ascii=False)),
        chat_template=_sha256(template) if template else "",
    )


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the text of the chat template; of several named ones the default, which is what a server renders."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def model_file(model: str, name: str) -> Path | None:
    """Returns the path of one of the model's files, from its folder or the hub's cache; `None` where it has no such."""
    from transformers.utils import cached_file

    found = cached_file(
        model,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def file_hashes(model: str) -> dict[str, str]:
    """Returns SHA-256 (hex) of each tokenizer file that the model has, by name."""
    hashes = {}
    for name in TOKENIZER_FILES:
        path = model_file(model, name)
        if path is not None:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def tokenizer_bytes(model: str) -> int:
    """Returns the bytes of all tokenizer files that the model has."""
    return sum(path.stat().st_size for name in TOKENIZER_FILES if (path := model_file(model, name)) is not None)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer.

    Args:
        model (`str`): Folder or hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code from the model's repository.

    Raises:
        UserError: There is no such model, or it has no tokenizer that loads.
    """
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, model, "tokenizer", trust_remote_code)


def load_config(model: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Loads a model's configuration.

    Raises:
        UserError: There is no such model, or its configuration does not load.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, model, "configuration", trust_remote_code)


def _load(auto: Any, model: str, what: str, trust_remote_code: bool) -> Any:
    folder = local_folder(model)
    try:
        return auto.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if folder is not None:
            _refuse_lacking(folder, what)
        text = str(error).strip()
        raise UserError(
            f"the {what} of model '{model}' cannot be loaded: {text.splitlines()[0] if text else type(error).__name__}",
            remedy="give a model folder, or a hub id that is in the cache or can be reached"
            + ("; its code needs trust_remote_code" if "trust_remote_code" in text else ""),
        ) from error


def _refuse_lacking(folder: Path, what: str) -> None:
    """Tells what a model folder lacks, where it is no question of what stands in its files.

    Raises:
        UserError: It has no tokenizer, is an adapter, or holds no model.
    """
    if what == "tokenizer" and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"the model folder {folder} has no tokenizer: {', '.join(_VOCABULARIES)} are not there",
            remedy=f"copy tokenizer.json, tokenizer_config.json and chat_template.jinja into it from the model that it "
            f"was made from, as with 'cp MODEL/*token* MODEL/chat_template* {folder}'",
        )
    if what != "configuration" or (folder / "config.json").is_file():
        return
    try:
        base = str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} holds no model: it has no config.json",
            remedy="give a folder that from_pretrained loads, such as 'model' of a training run",
        ) from None
    raise UserError(
        f"{folder} is a LoRA adapter of {base}, not a model",
        remedy=f"give its model; to train the adapter on: --model {base} --adapter {folder}",
    )


def local_folder(model: str) -> Path | None:
    """Returns the folder that `model` names, `None` for a hub id.

    Raises:
        UserError: It can only be a path, and there is no such folder.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    # A name that can only be a path must fail at once: asking the hub for it would wait for a network that may be
    # absent.
    if model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith("/"):
        raise UserError(
            f"the model folder {model} does not exist", remedy="check the path, or give a hub id such as org/name"
        )
    return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
