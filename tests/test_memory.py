"""The memory of a run is told beforehand: layers keep what autograd saves, and whole runs take what was told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan as benchmark
import pytest

from gymtrl.training.memory import MemoryEstimate, ModelShape, RunShape, activation_bytes, estimate, model_shape

TOKENS = 37  # in no width of the models, so that a shape tells whether a tensor has it
RUN = RunShape(objective="sft", method="lora", longest=512, micro_batch=2, accumulation=4, gradient_checkpointing=False)


def configuration(kind: str, layers: int) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}
    return (LlamaConfig if kind == "llama" else Qwen3Config)(**sizes, **heads)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return model_shape(configuration("llama", 4))


def saved_bytes(kind: str, layers: int, run: RunShape) -> int:
    """Bytes of what autograd saves in a forward pass, weights and their copies left out."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if run.weight_bytes == 2 else torch.float32
    model = AutoModelForCausalLM.from_config(configuration(kind, layers), dtype=dtype).model.train()
    if run.method == "lora":
        model = get_peft_model(model, LoraConfig(r=run.lora_r, target_modules="all-linear"))
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if run.method == "lora":
            model.enable_input_require_grads()
    sequences = run.micro_batch * (2 if run.objective == "dpo" else 1)
    saved: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if {TOKENS, TOKENS * sequences} & set(tensor.shape):
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(sequences, TOKENS, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[1:, -5:] = 0
    autocast = torch.autocast("cpu", torch.bfloat16) if run.cuda else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        kept = model(input_ids=ids, attention_mask=mask, use_cache=False)
        total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del kept
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("cuda", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_layers_keep_what_autograd_saves(kind: str, method: Any, cuda: bool, sequences: int) -> None:
    run = replace(RUN, method=method, longest=TOKENS, micro_batch=sequences, lora_r=8, cuda=cuda)
    run = replace(run, weight_bytes=2 if cuda and method == "lora" else 4)
    # What is no layer's, such as the last norm, is in both.
    one_layer = saved_bytes(kind, 4, run) - saved_bytes(kind, 3, run)
    assert activation_bytes(model_shape(configuration(kind, 4)), run) / 4 == pytest.approx(one_layer, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    run = replace(RUN, longest=TOKENS, micro_batch=1, gradient_checkpointing=True)
    for method in ("lora", "full"):
        run = replace(run, method=method)
        one_layer = saved_bytes("llama", 4, run) - saved_bytes("llama", 3, run)
        assert activation_bytes(model_shape(configuration("llama", 4)), run) / 4 == one_layer


def test_weights_are_counted_once(shape: ModelShape) -> None:
    layer = 64 * 96 * 2 + 64 * 48 * 2 + 64 * 160 * 3
    assert (shape.linear, shape.weights) == (4 * layer, 4 * (layer + 2 * 64) + 512 * 64 + 64)
    assert (shape.tied, shape.linears, shape.layers, shape.normed_heads, shape.stored_bytes) == (True, 28, 4, False, 4)
    full, lora = (estimate(shape, replace(RUN, method=method)) for method in ("full", "lora"))
    assert (full.weights, full.gradients, full.optimizer) == tuple(n * shape.weights for n in (4, 4, 8))
    adapter = 32 * 4 * (64 * 5 + 96 + 160 + 96 + 48 * 2 + 64 + 160 * 2 + 64)
    assert (lora.weights, lora.gradients, lora.optimizer) == (4 * (shape.weights + adapter), 4 * adapter, 8 * adapter)


def test_the_class_that_is_trained_is_counted_and_its_own_code_only_if_trusted(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=sizes | heads | linear, vision_config=vision)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    seeing = Qwen3_5ForConditionalGeneration(config)
    assert model_shape(config).weights == sum(weight.numel() for weight in seeing.parameters())
    assert model_shape(config).weights > sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())

    (tmp_path / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = configuration("llama", 2).to_dict() | {"model_type": "own", "architectures": ["OwnModel"]}
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(own | {"auto_map": names}))
    foreign = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model_shape(foreign)
    assert model_shape(foreign, trust_remote_code=True) == model_shape(configuration("llama", 2))


def test_parts_add_up_and_grow_with_what_is_asked(shape: ModelShape) -> None:
    def total(**changes: Any) -> int:
        return estimate(shape, replace(RUN, **changes)).total

    found = estimate(shape, RUN)
    assert isinstance(found, MemoryEstimate) and found.total == sum(dataclasses.asdict(found).values())
    for cuda in (False, True):
        for method in ("lora", "full"):
            here = {"cuda": cuda, "method": method}
            lengths = [total(longest=length, **here) for length in (64, 256, 1024, 4096)]
            batches = [total(micro_batch=rows, **here) for rows in (1, 2, 4, 8)]
            assert lengths == sorted(set(lengths)) and batches == sorted(set(batches))
            assert total(gradient_checkpointing=True, **here) < total(**here)
            assert total(objective="dpo", **here) > total(**here)
    assert total(method="lora") < total(method="lora", lora_r=64)
    assert total(method="qlora", cuda=True) < total(method="lora", cuda=True)
    assert total(accumulation=1, method="full") < total(method="full")


def test_a_second_model_is_needed_to_compare_with_in_full_training_alone(shape: ModelShape) -> None:
    for objective, method, second in (("dpo", "full", 1), ("kto", "full", 1), ("dpo", "lora", 0), ("sft", "full", 0)):
        found = estimate(shape, replace(RUN, objective=objective, method=method))
        assert found.reference == second * 4 * shape.weights


@pytest.mark.slow
def test_runs_take_what_was_told() -> None:
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as name:  # gigabytes, which pytest would keep
        folder = Path(name)
        benchmark.make_model("wide", folder / "wide")
        shape = model_shape(AutoConfig.from_pretrained(folder / "wide"))
        for method in ("lora", "full"):
            found = benchmark.measure(benchmark.Configuration("wide", method, 128), shape, folder)
            assert found["error"] == pytest.approx(0, abs=benchmark.WITHIN)
