"""The real chat model that is made from a pip package."""

from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gymtrl.errors import RunError, UserError
from gymtrl.models import smollm2 as module
from gymtrl.models.smollm2 import make_smollm2

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_loads_and_answers(smollm2_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.inference_mode():
        reply = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(reply[0, ids.shape[1] :])


def test_templates(smollm2_dir: Path, smollm2_tools_dir: Path) -> None:
    messages = [{"role": "user", "content": "Add 1 and 2."}]
    own, tools = (AutoTokenizer.from_pretrained(folder) for folder in (smollm2_dir, smollm2_tools_dir))
    assert '"add"' not in own.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    text = tools.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert '"add"' in text and text.endswith("<|im_start|>assistant\n")
    # The template's special tokens are the model's own, not spelt out in pieces.
    assert tools.tokenize("<|im_start|>") == ["<|im_start|>"] and tools.eos_token == "<|im_end|>"


def test_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        make_smollm2(tmp_path)
    with pytest.raises(UserError, match="template"):
        make_smollm2(tmp_path / "new", template="other")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    monkeypatch.setattr(module, "_gguf_path", lambda: broken)
    with pytest.raises(Exception):  # noqa: B017  # whatever the GGUF reader says
        make_smollm2(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(gguf: Path, out: Path, template: str) -> None:
        (out / "model.safetensors").write_text("new")

    monkeypatch.setattr(module, "_convert", write)
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").write_text("old")
    make_smollm2(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(gguf: Path, out: Path, template: str) -> None:
        raise OSError(number, "as the system says it")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(RunError, match="disk is full") as caught:
        make_smollm2(tmp_path / "out")
    assert caught.value.remedy and list(tmp_path.iterdir()) == []


def test_a_full_disk_as_safetensors_says_it(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from gymtrl.models import smollm2
smollm2._convert = lambda gguf, out, template: save_file({"a": torch.zeros(2**20)}, out / "model.safetensors")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    smollm2.make_smollm2(Path(sys.argv[1]))
except smollm2.RunError as error:
    print(error.remedy)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert "another disk" in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UserError, match=package) as caught:
        make_smollm2(tmp_path / "out")
    assert caught.value.remedy == "pip install 'gymtrl[train,demo]'"
