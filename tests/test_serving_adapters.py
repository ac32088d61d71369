"""Adapters behind the engine: they answer as PEFT does, and are refused where they are another model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from gymtrl.errors import UserError
from gymtrl.serving.checkpoint import Checkpoint, find_checkpoint
from gymtrl.serving.engine import Engine
from gymtrl.serving.server import load_model
from test_serving_engine import check_reply, prompts, reference, request, tiny_model, tiny_tokenizer


def make_base(folder: Path, **changes: int) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, **settings: object) -> Path:
    """An adapter that changes the answers: both of its matrices are random."""
    torch.manual_seed(1)
    chosen = {"target_modules": "all-linear"} | settings
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **chosen)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).save_pretrained(folder)
    return folder


def changed(adapter: Path, copy: Path, **fields: object) -> Path:
    """A copy of an adapter with other fields in its configuration."""
    shutil.copytree(adapter, copy)
    config = json.loads((adapter / "adapter_config.json").read_text()) | fields
    (copy / "adapter_config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "run" / "adapter", base)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_answers_are_those_of_peft(base: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    expected = expected.eval().get_base_model()
    plain, _ = load_model(base, device="cpu")
    loaded, tokenizer = load_model(adapter, device="cpu")
    engine = Engine(loaded, tokenizer, max_batch=8)
    try:
        asked = prompts(12, shared=20)
        results = [future.result(60) for future in [engine.submit(request(prompt)) for prompt in asked]]
    finally:
        engine.close()
    for prompt, result in zip(asked, results, strict=True):
        check_reply(expected, prompt, result, reference(expected, prompt, 12))
    unlike = sum(r.token_ids != reference(plain, p, 12) for p, r in zip(asked, results, strict=True))
    assert unlike > 6


def test_what_a_folder_holds_is_found(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = adapter.parent
    assert find_checkpoint(base) == Checkpoint(str(base))
    assert find_checkpoint(adapter) == find_checkpoint(run) == Checkpoint(str(base), adapter)
    assert find_checkpoint(adapter, model="hub/base") == Checkpoint("hub/base", adapter)
    make_base(tmp_path / "run" / "model")
    assert find_checkpoint(tmp_path / "run") == Checkpoint(str(tmp_path / "run" / "model"))
    with pytest.raises(UserError, match="needs no other"):
        find_checkpoint(base, model="hub/base")
    with pytest.raises(UserError, match="no folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="neither config"):
        find_checkpoint(tmp_path)


def test_an_adapters_own_tokenizer_is_taken(adapter: Path, base: Path, tmp_path: Path) -> None:
    own = make_adapter(tmp_path / "own", base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "as it was trained"
    tokenizer.save_pretrained(own)
    assert load_model(own, device="cpu")[1].chat_template == "as it was trained"
    assert load_model(adapter, device="cpu")[1].chat_template is None


def test_adapters_of_other_models_are_refused(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    with pytest.raises(UserError, match=f"was trained on .*base, not on {other}"):
        load_model(adapter, model=str(other), device="cpu")
    # Of the same name, as many folders are: then the shapes tell.
    gone = changed(adapter, tmp_path / "gone", base_model_name_or_path="/gone/wide")
    with pytest.raises(UserError, match="/gone/wide, which is not there") as caught:
        load_model(gone, device="cpu")
    assert "--model" in str(caught.value.remedy)
    wide = make_base(tmp_path / "wide", hidden_size=96)
    with pytest.raises(UserError, match="does not fit"):
        load_model(gone, model=str(wide), device="cpu")
    with pytest.raises(UserError, match="does not name the model"):
        load_model(changed(adapter, tmp_path / "nameless", base_model_name_or_path=None), device="cpu")
    with pytest.raises(UserError, match="its peft_type is LOHA"):
        load_model(changed(adapter, tmp_path / "loha", peft_type="LOHA"), device="cpu")
    with pytest.raises(UserError, match="'pissa_niter_4', which changes the base at random"):
        load_model(changed(adapter, tmp_path / "drawn", init_lora_weights="pissa_niter_4"), device="cpu")


def test_weights_that_find_no_layer_are_refused(adapter: Path, tmp_path: Path) -> None:
    shallow = make_base(tmp_path / "base", num_hidden_layers=2)
    with pytest.raises(UserError, match="does not fit"):
        load_model(changed(adapter, tmp_path / "deep", base_model_name_or_path=str(shallow)), device="cpu")
    # The other way round PEFT would draw the missing ones at random.
    few = make_adapter(tmp_path / "few", shallow, target_modules=["q_proj", "v_proj"])
    deep = make_base(tmp_path / "deep-base" / "base")
    with pytest.raises(UserError, match="weights of the adapter"):
        load_model(changed(few, tmp_path / "few-moved", base_model_name_or_path=str(deep)), device="cpu")
