"""`train sft` with the real trainer on a tiny model: results, masks under accumulation, resuming, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig

from gymtrl.errors import RunError, UserError
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.training.checkpoints import last_sealed
from gymtrl.training.data import read_dataset
from gymtrl.training.machine import Gpu, Machine
from gymtrl.training.memory import model_shape
from gymtrl.training.plan import FIXED_OPTIONS, OWN_OPTIONS, Plan, plan, trl_config
from gymtrl.training.prepare import train_inputs
from gymtrl.training.run import train
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.sft import SFT
from gymtrl.training.space import Sizes, require_space, room_needed
from gymtrl.workspace.artefact import up_to_date
from gymtrl.workspace.metrics import read_metrics

ROWS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A folder with a random Llama of two layers (`model`), and a dataset made for it (`dataset`)."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("train")
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, temperature=0.7, do_sample=True)
    model.save_pretrained(folder / "model")
    for split, count in (("train", ROWS), ("validation", 2)):
        rows = [_row(f"{i} + {i} =", f"{i} + {i} = {2 * i}" + " indeed" * (i % 5)) for i in range(count)]
        (folder / "filtered").mkdir(exist_ok=True)
        (folder / "filtered" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    format_sft(folder / "filtered", folder / "dataset", FormatSftSettings(model=str(folder / "model")))
    return folder


def _row(question: str, answer: str) -> dict[str, Any]:
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}]
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "response": {"output": output, "status": "completed", "model": "m"},
        "reward": 1.0,
        "agent_ref": {"name": "arithmetic"},
    }


def settings(**fields: Any) -> TrainSftSettings:
    return TrainSftSettings(**({"max_steps": 4, "effective_batch": 4, "lora_r": 4, "lora_alpha": 4} | fields))


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_lora_run_leaves_adapter_model_and_card(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(base / "dataset", tmp_path / "run", settings(learning_rate=0.05, max_steps=6))
    run = result.path
    assert sorted(path.name for path in run.iterdir()) == [
        "README.md",
        "adapter",
        "findings.json",
        "job.json",
        "manifest.json",
        "metrics.jsonl",
        "model",
        "result.json",
    ]
    assert result.last_loss < result.first_loss
    assert result.eval_before is not None and result.eval_after is not None and result.eval_after < result.eval_before
    assert [set(line) >= {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} for line in steps(run)] == [True] * 6
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (run / "model" / name).read_bytes() == (base / "model" / name).read_bytes()
    before = json.loads((base / "model" / "config.json").read_text())
    after = json.loads((run / "model" / "config.json").read_text())
    assert {k: v for k, v in after.items() if before.get(k) != v} == {}

    ids = torch.tensor([AutoTokenizer.from_pretrained(run / "model")("3 + 3 =")["input_ids"]])
    stock = AutoModelForCausalLM.from_pretrained(base / "model")
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    with torch.no_grad():
        plain, trained = stock(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(stock, run / "adapter")(ids).logits
    assert torch.allclose(trained, adapted, atol=1e-5) and not torch.allclose(trained, plain, atol=1e-3)
    manifest = json.loads((run / "manifest.json").read_text())
    source = json.loads((base / "dataset" / "manifest.json").read_text())["inputs"][0]["sha256"]
    assert source == manifest["extra"]["dataset_inputs"][0]["sha256"]
    assert source in (run / "README.md").read_text()


def test_full_run_leaves_a_model_only(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = train(base / "dataset", tmp_path / "run", settings(method="full", learning_rate=0.01, max_steps=2))
    assert result.adapter is None and not (tmp_path / "run" / "adapter").exists()
    new = AutoModelForCausalLM.from_pretrained(result.model)
    old = AutoModelForCausalLM.from_pretrained(base / "model")
    pairs = zip(new.parameters(), old.parameters(), strict=True)
    assert all(a.dtype == b.dtype and not torch.equal(a, b) for a, b in pairs)


def test_loss_is_a_mean_over_the_loss_tokens_whatever_the_accumulation(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "model")
    total, count = 0.0, 0
    for row in pq.read_table(base / "dataset" / "data", filters=None).to_pylist()[:ROWS]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
    runs = []
    for micro in (1, ROWS):
        chosen = settings(effective_batch=ROWS, micro_batch=micro, max_steps=2, learning_rate=0.01, warmup_ratio=0)
        train(base / "dataset", tmp_path / f"micro{micro}", chosen)
        runs.append(steps(tmp_path / f"micro{micro}"))
    for run in runs:
        assert run[0]["loss"] == pytest.approx(total / count, rel=1e-4)
        assert run[0]["grad_norm"] == pytest.approx(runs[0][0]["grad_norm"], rel=1e-3)
        assert run[1]["loss"] == pytest.approx(runs[0][1]["loss"], rel=1e-4)


_CHILD = """
import sys
from pathlib import Path
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.run import train
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_run_continues_to_the_same_result(base: Path, tmp_path: Path, method: str) -> None:
    from safetensors.torch import load_file

    chosen = settings(method=method, max_steps=20, save_steps=2, learning_rate=0.01)
    train(base / "dataset", tmp_path / "whole", chosen)
    arguments = [str(base / "dataset"), str(tmp_path / "killed"), chosen.model_dump_json()]
    work = tmp_path / ".killed.partial" / "checkpoints"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    # The folder of a checkpoint appears before its files: killed now, the run leaves a torn one.
    while not (work / "checkpoint-6").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)  # what it started hears of it and ends
    child.wait()
    assert not (tmp_path / "killed").exists()

    result = train(base / "dataset", tmp_path / "killed", chosen)
    assert result.resumed_from is not None and 4 <= result.resumed_from < 20
    whole, killed = steps(tmp_path / "whole"), steps(tmp_path / "killed")
    assert [line["step"] for line in killed] == list(range(1, 21))
    for name in ("loss", "lr", "grad_norm", "tokens"):
        assert [line[name] for line in killed] == pytest.approx([line[name] for line in whole], rel=1e-6), name
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(float((a[key] - b[key]).abs().max()) <= 1e-6 for key in a)
    assert not (tmp_path / "killed" / "checkpoints").exists() and not work.exists()


_KILLED_AT_EXPORT = """
import gc, os, signal, sys
if sys.orig_argv[1:3] == ["-m", "gymtrl.training.worker"]:
    import transformers
    import gymtrl.training.export as export
    def killed(base, out):
        # The model is loaded once more here, so what was trained must be gone.
        assert not any(isinstance(thing, transformers.Trainer) for thing in gc.get_objects())
        os.kill(os.getpid(), signal.SIGKILL)
    export._copy_settings = killed
"""


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_run_that_ends_while_it_is_exported_takes_no_further_step(
    base: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    # Four steps of four rows end within the second pass over twelve; the schedule leaves a fifth step its full rate.
    chosen = settings(method=method, scheduler="constant", warmup_ratio=0, learning_rate=0.01, max_steps=4)
    train(base / "dataset", tmp_path / "whole", chosen)

    # A model folder that cannot be made ends the process when all is trained.
    partial = tmp_path / ".killed.partial"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_KILLED_AT_EXPORT)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=os.pathsep)
        with pytest.raises(RunError, match="status 137"):
            train(base / "dataset", tmp_path / "killed", chosen)
    assert last_sealed(partial / "checkpoints") is not None
    train(base / "dataset", tmp_path / "killed", chosen)
    whole, again = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [line.keys() for line in again] == [line.keys() for line in whole]
    for line, expected in zip(again, whole, strict=True):
        same = {key: value for key, value in expected.items() if key not in ("seconds", "peak_memory")}
        assert {key: line[key] for key in same} == pytest.approx(same)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(float((a[key] - b[key]).abs().max()) <= 1e-7 for key in a)


def test_changed_weights_make_the_run_out_of_date(base: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(base / "model", model)
    chosen = settings(model=str(model), max_steps=1)
    out = train(base / "dataset", tmp_path / "run", chosen).path
    assert train_inputs(base / "dataset", settings()) == [base / "dataset", base / "model"]

    def fresh() -> bool:
        inputs = train_inputs(base / "dataset", chosen)
        return up_to_date(out, verb="train sft", settings=chosen, inputs=inputs) is not None

    assert fresh()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert not fresh()


def test_seed_changes_the_order_of_the_rows(base: Path, tmp_path: Path) -> None:
    orders = []
    for seed in (0, 7):
        run = tmp_path / f"run{len(orders)}"
        train(base / "dataset", run, settings(seed=seed, effective_batch=2, max_steps=3, learning_rate=1e-9))
        orders.append([line["tokens"] for line in steps(run)])
    assert orders[0] != orders[1]


def test_mistakes_are_told_before_a_model_is_loaded(base: Path, tmp_path: Path) -> None:
    dataset, out = base / "dataset", tmp_path / "run"
    cases = [
        (settings(trl={"weight_decya": 0.1}), "did you mean 'weight_decay'"),
        (settings(trl={"num_train_epochs": 1}), "is set by 'epochs'"),
        (settings(trl={"max_length": 10}), "trained on as they are"),
        (settings(trl={"packing": True}), "trained on as they are"),
        (settings(trl={"model_init_kwargs": "bf16"}), "is no mapping"),
        (settings(micro_batch=3), "no multiple of 3"),
        (settings(model=str(tmp_path / "absent")), "does not exist"),
    ]
    for chosen, message in cases:
        with pytest.raises(UserError, match=message):
            train(dataset, out, chosen)
    with pytest.raises(UserError, match="TRL refuses"):
        train(dataset, out, settings(trl={"optim": "no-such"}))
    assert not out.exists()


def test_dataset_for_another_template_is_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(base / "model", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="chat template") as caught:
        train(base / "dataset", tmp_path / "run", settings(model=str(other)))
    assert f"--model {other}" in (caught.value.remedy or "")


def test_rows_without_loss_are_refused(base: Path, tmp_path: Path) -> None:
    import shutil

    dataset = tmp_path / "masked"
    shutil.copytree(base / "dataset", dataset)
    path = next((dataset / "data").glob("train-*"))
    table = pq.read_table(path)
    masked = [[-100] * len(ids) for ids in table["input_ids"].to_pylist()]
    column = pa.array(masked, type=table.schema.field("labels").type)
    pq.write_table(table.set_column(table.schema.get_field_index("labels"), "labels", column), path)
    with pytest.raises(UserError, match="no token that carries loss"):
        train(dataset, tmp_path / "run", settings())


def planned(settings: TrainSftSettings, *, rows: int, gpus: int = 0) -> Plan:
    machine = Machine(memory=2**40, limit="memory", cores=2, gpus=(Gpu("large", 2**40, 2**40, True),) * gpus)
    shape = model_shape(LlamaConfig())
    return plan(settings, SFT, rows=rows, longest=100, shape=shape, machine=machine).plan


def test_plan_follows_the_data_and_the_machine() -> None:
    small = planned(TrainSftSettings(), rows=50)
    assert (small.epochs, small.effective_batch, small.micro_batch, small.steps) == (2, 4, 1, 26)
    assert (small.learning_rate, small.save_steps, small.gradient_checkpointing) == (2e-4, 3, False)
    large = planned(TrainSftSettings(method="full"), rows=30_000, gpus=1)
    assert (large.epochs, large.effective_batch, large.micro_batch, large.learning_rate) == (1, 32, 8, 1e-5)


def test_options_of_trl_exist_and_are_merged_with_ours(base: Path, tmp_path: Path) -> None:
    import dataclasses

    from trl import SFTConfig

    assert {*FIXED_OPTIONS, *OWN_OPTIONS, *SFT.fixed_options} <= {field.name for field in dataclasses.fields(SFTConfig)}
    chosen = settings(trl={"model_init_kwargs": {"attn_implementation": "sdpa"}})
    data = read_dataset(base / "dataset", SFT.made_by, SFT.sequences)
    config = trl_config(chosen, SFT, data, planned(chosen, rows=ROWS), tmp_path)
    assert config.model_init_kwargs == {"dtype": "float32", "attn_implementation": "sdpa"}


def test_space_is_asked_for_before_training(tmp_path: Path) -> None:
    sizes = Sizes(weights=1000, trained=100, weight_bytes=2)
    adapter, every = room_needed(sizes, lora=True), room_needed(sizes, lora=False)
    assert adapter.run - every.run == 400
    assert room_needed(sizes, lora=True, tokens=10**6).run - adapter.run >= 8 * 10**6
    require_space(tmp_path, 1)
    with pytest.raises(RunError, match="are free") as caught:
        require_space(tmp_path, 10**18)
    assert "another disk" in (caught.value.remedy or "")


@pytest.mark.long
def test_full_disk_while_saving_is_told_and_leaves_no_half_folder(base: Path, tmp_path: Path) -> None:
    # A limit on the size of files fails the same write calls as a full disk, with no need for a disk to fill.
    child = """
import resource, sys
from pathlib import Path
from gymtrl.errors import RunError
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.run import train
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
try:
    train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
except RunError as error:
    print(error.exit_status, error.message, "|", error.remedy)
"""
    chosen = settings(method="full", max_steps=4, save_steps=2).model_dump_json()
    arguments = [str(base / "dataset"), str(tmp_path / "run"), chosen]
    done = subprocess.run(
        [sys.executable, "-c", child, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("3 the disk is full") and "run it again, to go on" in done.stdout
    assert not (tmp_path / "run").exists()
    assert train(base / "dataset", tmp_path / "run", TrainSftSettings.model_validate_json(chosen)).model.is_dir()
