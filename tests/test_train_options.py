"""Options that are passed on to TRL, PEFT and transformers: names and values are judged before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import distributed
from transformers import LlamaConfig

from gymtrl import (
    FormatSftSettings,
    TrainDpoSettings,
    TrainGrpoSettings,
    TrainKtoSettings,
    TrainSftSettings,
    UserError,
    format_sft,
    train,
)
from gymtrl.training.prepare import check_settings, plan_facts
from gymtrl.training.settings import TrainSettings
from gymtrl.training.values import check_layers
from tiny import filtered, sums, tiny_llama

TINY = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def sft(**trl: Any) -> TrainSftSettings:
    return TrainSftSettings(trl=trl)


def lora(**peft: Any) -> TrainSftSettings:
    return TrainSftSettings(peft=peft)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("options")
    model = tiny_llama(folder / "model", smollm2_dir)
    return format_sft(
        filtered(folder / "filtered", sums(8), []), folder / "dataset", FormatSftSettings(model=str(model))
    ).path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainSftSettings(scheduler="lineer"), "lineer'? is not a valid SchedulerType"),
        (sft(lr_scheduler_kwargs={"a": 1}), "unexpected keyword argument 'a'"),
        (sft(optim="adamw_tosch"), "adamw_tosch'? is not a valid OptimizerNames"),
        (sft(adam_beta1=2.0), "[Ii]nvalid beta"),
        (sft(weight_decay="x"), "weight_decay = 'x'"),
        (sft(weight_decay="0.1"), "weight_decay = '0.1' is a text"),
        (sft(max_grad_norm=float("inf")), "max_grad_norm = inf"),
        (sft(loss_type="dfft"), "no loss 'dfft' for sft; did you mean 'dft'"),
        (sft(per_device_eval_batch_size=0), "per_device_eval_batch_size 0 is less than 1"),
        (sft(model_init_kwargs={"dtype": "flot32"}), "no dtype 'flot32'"),
        (sft(model_init_kwargs={"dtype": "float64"}), "no dtype 'float64'"),
        (sft(assistant_only_loss=True), "'assistant_only_loss' cannot be changed"),
        (sft(chat_template_path="/nope"), "'chat_template_path' cannot be changed"),
        (sft(eval_steps=5), "'eval_steps' cannot be changed"),
        (TrainDpoSettings(loss_type=["sigmod"]), "no loss 'sigmod' for dpo; did you mean 'sigmoid'"),
        (TrainDpoSettings(loss_weights=[1.0]), "same length"),
        (TrainKtoSettings(trl={"per_device_eval_batch_size": 2}), "is less than 4"),
        (TrainGrpoSettings(loss_type="bnpo"), "loss_type='bnpo' is not among"),
        (lora(lora_dropout="x"), "lora_dropout = 'x'"),
        (lora(bias="some"), "bias = 'some'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_the_libraries_refuse(settings: TrainSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(settings)


@pytest.mark.parametrize(
    "settings",
    [
        *(made() for made in (TrainSftSettings, TrainDpoSettings, TrainKtoSettings, TrainGrpoSettings)),
        sft(optim="adamw_torch_fused", weight_decay=1, adam_epsilon=1e-7, neftune_noise_alpha=5),
        TrainSftSettings(scheduler="cosine", trl={"lr_scheduler_kwargs": {"num_cycles": 2}, "loss_type": "dft"}),
        TrainDpoSettings(loss_type=["ipo"], trl={"precompute_ref_log_probs": True}),
        TrainGrpoSettings(loss_type="dapo", trl={"scale_rewards": "group", "epsilon": 0.1}),
        lora(use_rslora=True, lora_dropout=0.05, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]),
    ],
)
def test_values_that_are_taken_are_tried_without_joining_other_processes(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another launcher's variables, by which a configuration would wait for processes that never come.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    check_settings(settings)
    assert not distributed.is_initialized()


def test_tied_embeddings_get_no_adapter() -> None:
    tied = LlamaConfig(**TINY.to_dict() | {"tie_word_embeddings": True})
    for module in ("embed_tokens", "lm_head"):
        for options in ({"target_modules": ["q_proj", module]}, {"modules_to_save": [module]}):
            with pytest.raises(UserError, match="both would change, or come apart"):
                check_layers(lora(**options), tied)
            check_layers(lora(**options), TINY)
    check_layers(lora(lora_dropout=0.1), tied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "k_prj"]},
            "target_modules: the model has no module 'k_prj'; did you mean 'k_proj'",
        ),
        ({"modules_to_save": ["head"]}, "modules_to_save: the model has no module 'head'"),
        ({"target_modules": ".*q_prj"}, "PEFT refuses the settings: .*q_prj"),
        ({"target_modules": "*proj"}, "PEFT refuses the settings: nothing to repeat"),
        ({"target_modules": ["norm"]}, "PEFT refuses the settings: .*not supported"),
    ],
)
def test_layers_that_the_model_has_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layers(lora(**options), TINY)
    check_layers(lora(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights="pissa"), TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' is drawn at random or from data"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq_config' changes more"),
        ({"init_lora_weights": "eva"}, "'eva' is drawn"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "'layer_replication' changes more"),
    ],
)
def test_an_adapter_that_would_be_merged_into_another_model_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(lora(**options))


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        (sft(wamup_steps=1), "'wamup_steps'; did you mean 'warmup_steps'", "set warmup_ratio, which stands for it"),
        (sft(learning_rat=1), "did you mean 'learning_rate'", "set learning_rate"),
        (sft(num_train_epoch=1), "did you mean 'num_train_epochs'", "set epochs"),
        (sft(max_lenght=1), "did you mean 'max_length'", "documentation of SFTConfig"),
        (sft(packin=True), "did you mean 'packing'", "documentation of SFTConfig"),
        (sft(gradient_checkpointng=True), "did you mean 'gradient_checkpointing'", "set gradient_checkpointing"),
        (TrainDpoSettings(trl={"bta": 1}), "did you mean 'beta'", "set beta"),
        (lora(rank=8), "'rank' is set by 'lora_r'", "set lora_r"),
        (lora(target_module="q_proj"), "did you mean 'target_modules'", "documentation of LoraConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_option_names_the_nearest_and_the_setting_that_stands_for_it(
    settings: TrainSettings, message: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_settings(settings)
    assert remedy in (caught.value.remedy or "")


def test_numbers_without_end_and_processes_that_do_not_divide_are_no_settings() -> None:
    with pytest.raises(ValueError, match="finite"):
        TrainSftSettings(learning_rate=float("inf"))
    with pytest.raises(ValueError, match="nproc 2 cannot be divided among 3 nodes"):
        TrainSftSettings(nproc=2, nodes=3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheduler": "lineer"},
        {"peft": {"target_modules": ["q_prj"]}},
        {"trl": {"weight_decay": "x"}},
        {"engine": "zero3", "trl": {"use_cpu": True}},
        {"trl": {"fp16": True, "use_cpu": True}},
    ],
    ids=str,
)
def test_a_plan_refuses_them_and_a_run_does_before_an_interrupted_one_is_discarded(
    wrong: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    settings = TrainSftSettings(**({"effective_batch": 4, "max_steps": 2} | wrong))
    with pytest.raises(UserError):
        plan_facts(dataset, settings, calibrated=False)
    checkpoint = tmp_path / ".run.partial" / "checkpoints" / "checkpoint-90" / "weights"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("hours")
    with pytest.raises(UserError):
        train(dataset, tmp_path / "run", settings)
    assert checkpoint.read_text() == "hours"


def test_nodes_outside_a_job_cost_no_interrupted_run_and_leave_nothing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    checkpoint = tmp_path / ".run.partial" / "checkpoints" / "checkpoint-90" / "weights"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("hours")
    settings = TrainSftSettings(effective_batch=4, nproc=2, nodes=2, trl={"use_cpu": True})
    for name in ("run", "new"):
        with pytest.raises(UserError, match="this is no Slurm job"):
            train(dataset, tmp_path / name, settings)
    assert checkpoint.read_text() == "hours"
    assert [path.name for path in tmp_path.iterdir()] == [".run.partial"]
