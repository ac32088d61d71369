"""`gymtrl run`: a real job from a recipe with a tiny model, killed on the way; what is looked at before it starts."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gymtrl.errors import UserError
from gymtrl.formats.settings import FormatKtoSettings
from gymtrl.formats.unpaired import format_kto
from gymtrl.pipeline.run import open_job, run_job, show_job
from gymtrl.pipeline.sections import Stage
from gymtrl.training.run import train
from gymtrl.training.settings import TrainSftSettings
from gymtrl.workspace.artefact import read_manifest
from rows import row, write_rows

TRAINING = {"max_steps": 8, "effective_batch": 4, "save_steps": 2, "lora_r": 4, "lora_alpha": 4}
RECIPE = """\
rollouts: rollouts.jsonl
model: {model}
out: out
filter:
  validation: 0.2
  seed: 3
format dpo: {{margin: 0.5}}
train sft: {training}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A random Llama of two layers with the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **shape, **ends)).save_pretrained(folder)
    return folder


@pytest.fixture
def job(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rollouts and a recipe, which the test runs in."""
    rows = [row(f"{i} + {i} =", f"{i + i + wrong}", float(not wrong), index=i, repeat=wrong)
            for i in range(20) for wrong in (0, 1)]  # fmt: skip
    write_rows(tmp_path / "rollouts.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, training=TRAINING))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gymtrl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gymtrl", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def states(shown: str) -> dict[str, bool]:
    """Of each stage in the table at the end, whether there was something to do."""
    lines = [line.split() for line in shown[shown.rindex("\nTime") :].splitlines()[3:] if line.strip()]
    return {name: not rest for name, _, *rest in lines}


def test_killed_in_training_it_goes_on_to_the_same_model_and_then_is_up_to_date(job: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gymtrl", "run", "recipe.yaml"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    checkpoints = job / "out" / ".trained.partial" / "checkpoints"
    end = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-[4-9]")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert not (job / "out" / "trained").exists()

    shown = StringIO()
    show_job(open_job(Path("recipe.yaml")), console=Console(file=shown, width=100))
    dry = shown.getvalue()
    assert "filter → out/filter: up to date" in dry and "format sft → out/sft: up to date" in dry
    assert "train sft → out/trained: to do" in dry and "not used for this objective: format dpo" in dry
    assert "recipe recipe.yaml:6" in dry and "RFT" not in dry  # what is no default, and nothing else

    done = gymtrl(job, "run", "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8/8" in done.stderr and "step 1/8" not in done.stderr
    assert "plan: steps 8 · rows a step 4" in done.stdout
    before, after = done.stdout.split("SFT of ")  # what is wrong with it is told before and afterwards
    assert "warning: Very few optimizer steps (few_steps)" in before and "Very few optimizer steps" in after
    page = job / "out" / "trained" / "report.html"
    page.unlink()  # as an interruption right after training would leave it
    assert states(done.stdout) == {
        "inspect": False,
        "filter": False,
        "format": False,
        "train": True,
        "together": True,
    }
    again = StringIO()
    assert run_job(open_job(Path("recipe.yaml")), console=Console(file=again, width=100)) == 0
    assert states(again.getvalue()) == dict.fromkeys(("inspect", "filter", "format", "train"), False) | {
        "together": True
    }
    assert page.is_file() and "Very few optimizer steps" in again.getvalue()

    settings: dict[str, Any] = read_manifest(job / "out" / "trained").settings
    assert {name: settings[name] for name in TRAINING} == TRAINING
    train(Path("out/sft"), tmp_path / "whole", TrainSftSettings(**settings))
    weights = "model/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (job / "out" / "trained" / weights).read_bytes()


def test_a_changed_setting_redoes_its_stage_and_the_rest(job: Path) -> None:
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("max_steps': 8", "max_steps': 1"))
    out = StringIO()
    console = Console(file=out, width=100)
    assert run_job(open_job(recipe), console=console) == 0
    shown = out.getvalue()
    assert all(states(shown).values())
    assert "─ Rewards" in shown  # of the inspection
    recipe.write_text(recipe.read_text().replace("lora_r': 4", "lora_r': 2"))
    assert [step.done() for step in open_job(recipe).steps] == [True, True, False]
    recipe.write_text(recipe.read_text().replace("  seed: 3", "  seed: 4"))
    show_job(open_job(recipe), console=console)
    assert out.getvalue()[len(shown) :].count(": to do") == 3
    show_job(open_job(recipe), start=Stage.TRAIN, console=console)
    assert out.getvalue().count(": taken as it is") == 2 and out.getvalue().count(": to do") == 4

    taken, made = (Path("out", name, "manifest.json").read_bytes() for name in ("filter", "sft"))
    assert run_job(open_job(recipe), start=Stage.FORMAT, console=console) == 0
    assert Path("out/filter/manifest.json").read_bytes() == taken
    assert Path("out/sft/manifest.json").read_bytes() != made


def test_a_stage_that_is_not_there_cannot_be_started_after(job: Path) -> None:
    done = gymtrl(job, "run", "recipe.yaml", "--from", "train")
    assert done.returncode == 2 and "--from train: there is no out/filter yet" in done.stderr
    assert not (job / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m", "rollouts is required"),
        ("rollouts: none.jsonl\nmodel: m", "none.jsonl does not exist"),
        ("rollouts: rollouts.jsonl\nmodel: m\nobjective: ppo", r"objective = 'ppo' \(recipe r.yaml:3\)"),
        ("rollouts: rollouts.jsonl\nmodel: m\ntrain sft:\n  epochs: -1", r"epochs = -1 \(recipe r.yaml:4\)"),
        ("rollouts: rollouts.jsonl\nmodel: m\ntrain sft: {trl: {adam_epsilom: 1}}", "did you mean 'adam_epsilon'"),
        ("rollouts: rollouts.jsonl\nmodel: m\ntrain sft: {report_to: [wandbb]}", "did you mean 'wandb'"),
        ("rollouts: rollouts.jsonl\nmodel: m\ntrain sft: {scheduler: lineer}", "lineer'? is not a valid"),
        ("rollouts: rollouts.jsonl\nmodel: m\ntrain sft: {trl: {weight_decay: x}}", "weight_decay = 'x'"),
        (
            "rollouts: rollouts.jsonl\nmodel: m\nobjective: grpo\nformat grpo: {kind: prompts}",
            r"kind = 'prompts' \(recipe r.yaml:4\): 'train grpo' takes groups",
        ),
        ("rollouts: rollouts.jsonl\nmodel: m\nvalidate: {repeats: 0}", r"repeats = 0 \(recipe r.yaml:3\)"),
    ],
)
def test_a_mistake_in_any_section_shows_before_the_first_stage(job: Path, text: str, words: str) -> None:
    Path("r.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        open_job(Path("r.yaml"))


def test_layers_that_the_model_has_not_show_before_the_first_stage(job: Path, model: Path) -> None:
    training = TRAINING | {"peft": {"target_modules": ["q_prj"]}}
    (job / "recipe.yaml").write_text(RECIPE.format(model=model, training=training))
    with pytest.raises(UserError, match="no module 'q_prj'; did you mean 'q_proj'"):
        run_job(open_job(Path("recipe.yaml")))
    assert not (job / "out" / "filter").exists()


def test_the_validation_gets_what_the_other_stages_know(job: Path, model: Path) -> None:
    recipe = job / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("filter:", "filter:\n  cluster: metadata.twin") + "validate:\n")
    resolved = open_job(Path("recipe.yaml")).resolved["validate"]
    settings = resolved.settings
    assert (settings.baseline, settings.cluster) == (str(model), "metadata.twin")
    assert settings.tasks == Path("out/filter/heldout_inputs.jsonl")
    assert resolved.origins["baseline"] == "the model before training (recipe recipe.yaml:2)"
    recipe.write_text(recipe.read_text() + "  baseline: other\n")
    assert open_job(Path("recipe.yaml")).resolved["validate"].settings.baseline == "other"


def test_without_gym_or_tasks_a_validation_stops_the_job_before_it_trains(job: Path) -> None:
    recipe = job / "recipe.yaml"
    recipe.write_text(recipe.read_text() + f"validate: {{gym_home: {job / 'nowhere'}}}\n")
    with pytest.raises(UserError, match="not installed"):
        run_job(open_job(Path("recipe.yaml")))
    assert not (job / "out").exists()
    recipe.write_text(recipe.read_text().replace("gym_home:", "endpoint_port: 1, head: 'http://x', gym_home:"))
    with pytest.raises(UserError, match="no tasks to validate on") as refused:
        run_job(open_job(Path("recipe.yaml")))
    assert refused.value.remedy is not None and "materialized_inputs" in refused.value.remedy
    assert sorted(os.listdir(job / "out")) == ["filter"]
    (job / "out" / "sft").mkdir()
    (job / "out" / "sft" / "manifest.json").write_bytes(
        (job / "out" / "filter" / "manifest.json").read_bytes().replace(b'"verb": "filter"', b'"verb": "format sft"')
    )
    with pytest.raises(UserError, match="no tasks to validate on"):
        run_job(open_job(Path("recipe.yaml")), start=Stage.TRAIN)


def test_a_folder_of_another_objective_is_not_overwritten(job: Path, model: Path) -> None:
    format_kto(Path("rollouts.jsonl"), Path("out/sft"), FormatKtoSettings(model=str(model)))
    with pytest.raises(UserError, match="out/sft holds what 'format kto' wrote, not 'format sft'"):
        run_job(open_job(Path("recipe.yaml")))


def test_what_is_packed_is_not_unpacked_to_show_a_job(job: Path) -> None:
    Path("rollouts.jsonl.gz").write_bytes(gzip.compress(Path("rollouts.jsonl").read_bytes()))
    Path("rollouts.jsonl").unlink()
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace("rollouts.jsonl", "rollouts.jsonl.gz"))
    shown = open_job(recipe, dry=True)
    out = StringIO()
    show_job(shown, console=Console(file=out))
    assert not (job / "out").exists()
    opened = open_job(recipe)
    opened.steps[0].work(Console(file=StringIO()))
    show_job(shown, console=Console(file=out))  # which has not seen that they are unpacked by now
    assert out.getvalue().count("filter → out/filter: to do") == 2
    assert open_job(recipe, dry=True).steps[0].done()
