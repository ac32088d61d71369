"""`gymtrl plan` and `train --emit` as a user calls them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from gymtrl import (
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatSftSettings,
    TrainGrpoSettings,
    TrainSftSettings,
    UserError,
    format_dpo,
    format_grpo,
    format_kto,
    format_sft,
)
from gymtrl.cli.main import app
from gymtrl.training.calibrate import Speed, row_tokens
from gymtrl.training.machine import ADDRESS_SPACE, Gpu, Machine
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import check_options
from gymtrl.training.prepare import prepare, require_quantization
from gymtrl.training.sft import SFT
from rows import write_rows
from tiny import filtered, sums, tiny_llama

_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.RLIM_INFINITY))
from gymtrl.cli.main import main
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A dataset of 28 rows for a model of random weights."""
    folder = tmp_path_factory.mktemp("plan")
    model = tiny_llama(folder / "model", smollm2_dir)
    source = filtered(folder / "filtered", sums(28), [])
    return format_sft(source, folder / "dataset", FormatSftSettings(model=str(model))).path


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A dataset for SmolLM2, of which there is all but the weights."""
    folder = tmp_path_factory.mktemp("weightless")
    model = shutil.copytree(smollm2_dir, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    source = filtered(folder / "filtered", sums(28, words=200), [])
    return format_sft(source, folder / "dataset", FormatSftSettings(model=str(model))).path


def planned(dataset: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", "sft", str(dataset), "--json", *options], catch_exceptions=False)
    assert done.exit_code == 0
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts | {name: entry["value"] for name, entry in facts["plan"].items()}


def test_a_plan_tells_the_data_the_numbers_the_memory_and_the_time(tiny: Path) -> None:
    facts = planned(tiny)
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert facts["data"]["rows"] == facts["rows"] == manifest["counts"]["written"] == 28
    assert facts["data"]["tokens"] > facts["data"]["loss_tokens"] > 28
    # Two passes over so few rows, in steps of the fewest rows that sft takes.
    assert (facts["epochs"], facts["effective_batch"], facts["steps"]) == (2.0, 4, 14)
    assert facts["plan"]["steps"]["origin"] == "epochs * rows / effective_batch"
    assert sum(facts["memory"]["parts"].values()) == facts["memory"]["total"] < facts["memory"]["available"]
    speed = facts["speed"]
    assert speed["tokens_per_second"] > 0 and speed["peak_memory"] > facts["memory"]["total"]
    assert speed["seconds"] == pytest.approx(2 * facts["data"]["tokens"] / speed["tokens_per_second"], rel=0.01)
    # Nothing was written beside the dataset.
    assert sorted(path.name for path in tiny.parent.iterdir()) == ["dataset", "filtered", "model"]


def test_the_time_of_several_processes_is_that_of_so_many(tiny: Path) -> None:
    facts = planned(tiny, "--nproc", "2")
    speed = facts["speed"]
    assert (facts["processes"], speed["processes"]) == (2, 2)  # they share the cores, so none is as fast as one alone
    assert speed["seconds"] == pytest.approx(2 * facts["data"]["tokens"] / speed["tokens_per_second"], rel=0.01)


def test_nodes_share_the_time_that_one_of_them_would_take() -> None:
    assert Speed(tokens_per_second=100.0, processes=2, peak_memory=1).seconds(6000, nodes=3) == 20.0


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_every_objective_tells_its_time(name: str, tiny: Path, tmp_path: Path) -> None:
    model, source = str(tiny.parent / "model"), write_rows(tmp_path / "rollouts.jsonl", sums(8))
    dataset = tmp_path / name
    if name == "grpo":
        format_grpo(source, dataset, FormatGrpoSettings(model=model, kind="groups"))
    elif name == "dpo":
        format_dpo(source, dataset, FormatDpoSettings(model=model))
    else:
        format_kto(source, dataset, FormatKtoSettings(model=model))
    done = CliRunner().invoke(app, ["plan", name, str(dataset), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["speed"]["seconds"] > 0
    # The tokens whose speed is measured are counted as those of the dataset are.
    rows = Dataset.from_parquet([str(path) for path in sorted(dataset.glob("data/train-*.parquet"))])
    objective = OBJECTIVES[name]  # type: ignore[index]
    assert row_tokens(rows, objective.sequences).sum() == facts["data"]["tokens"]


def test_four_bits_need_a_gpu_bitsandbytes_and_recorded_log_probabilities(tiny: Path, tmp_path: Path) -> None:
    source, groups = write_rows(tmp_path / "rollouts.jsonl", sums(8)), tmp_path / "groups"
    format_grpo(source, groups, FormatGrpoSettings(model=str(tiny.parent / "model"), kind="groups"))
    with pytest.raises(UserError, match="16 of 16 rows have no recorded log-probabilities") as caught:
        prepare(groups, TrainGrpoSettings(method="qlora"))
    assert "set method to lora" in (caught.value.remedy or "")

    card = Gpu("a card", 2**30, 2**30, True)
    with pytest.raises(UserError, match="needs a GPU"):
        require_quantization(Machine(2**30, "memory", 1))
    if find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="needs bitsandbytes"):
            require_quantization(Machine(2**30, "memory", 1, (card,)))


@pytest.mark.parametrize(
    "options",
    [{"hub_token": "hf_secret"}, {"model_init_kwargs": {"token": "hf_secret"}}],
    ids=["trl", "model_init_kwargs"],
)
def test_tokens_are_refused_for_they_would_be_written_down(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="token' would be written") as caught:
        check_options(TrainSftSettings(trl=options), SFT)
    assert "HF_TOKEN" in (caught.value.remedy or "") and "secret" not in str(caught.value)


def test_a_plan_in_words(tiny: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "sft", str(tiny), "--no-calibrate", "--epochs", "3"])
    assert done.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert rows["epochs"] == ["3", "set"] and rows["steps"][0] == "21" and rows["effective_batch"][0] == "4"
    assert re.search(r"^memory a process: about \d+ MiB beyond Python and its libraries, ", done.stdout, re.MULTILINE)
    assert re.search(r"^ +weights \d+ MiB.* logits \d+ MiB", done.stdout, re.MULTILINE)
    assert re.search(r"^data: 28 rows, [\d,]+ tokens, [\d,]+ of them carry loss; ", done.stdout, re.MULTILINE)
    assert "tokens/s" not in done.stdout


def test_what_is_planned_follows_the_settings_and_needs_no_weights(without_weights: Path) -> None:
    lora, full = (planned(without_weights, "--no-calibrate", "--method", name) for name in ("lora", "full"))
    assert full["memory"]["parts"]["optimizer"] > 10 * lora["memory"]["parts"]["optimizer"]
    assert full["memory"]["total"] > 1.5 * lora["memory"]["total"]
    assert lora["learning_rate"] > full["learning_rate"]
    four = planned(without_weights, "--no-calibrate", "--effective-batch", "8", "--micro-batch", "4")
    assert (four["accumulation"], four["steps"]) == (2, 8)
    assert four["memory"]["parts"]["logits"] > 3 * lora["memory"]["parts"]["logits"]


def under_limit(dataset: Path, memory: int, *options: str) -> subprocess.CompletedProcess[str]:
    """`plan` in a process whose address space is limited, as by `ulimit -v`, so that training has `memory`."""
    words = ["plan", "sft", str(dataset), "--no-calibrate", "--json", *options]
    command = [sys.executable, "-c", _LIMITED, str(ADDRESS_SPACE + memory), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_less_memory_makes_another_plan_and_too_little_none(without_weights: Path) -> None:
    free = planned(without_weights, "--no-calibrate")
    assert free["gradient_checkpointing"] is False and free["notes"] == []
    found = under_limit(without_weights, 2000 * 2**20)
    assert found.returncode == 0, found.stderr
    tight = json.loads(found.stdout)
    assert tight["plan"]["gradient_checkpointing"]["value"] is True
    assert tight["memory"]["total"] <= tight["memory"]["available"] < free["memory"]["total"]
    assert any("gradient checkpointing" in note for note in tight["notes"])

    refused = under_limit(without_weights, 2000 * 2**20, "--method", "full")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.search(r"^error: training needs \d.* of memory at the least, and .* can be used", refused.stderr)
    assert re.search(r"^remedy: .*lora", refused.stderr, re.MULTILINE)


def test_telling_the_time_needs_the_weights(without_weights: Path) -> None:
    command = [sys.executable, "-m", "gymtrl", "plan", "sft", str(without_weights)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: the weights of {without_weights.parent / 'model'} cannot be read: " in done.stderr


def test_a_job_script_is_printed_in_place_of_training(tiny: Path, tmp_path: Path) -> None:
    words = ["train", "sft", str(tiny), "-o", str(tmp_path / "my run"), "--nproc", "8", "--nodes", "2"]
    command = [sys.executable, "-m", "gymtrl", *words, "--emit", "slurm", "--hours", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert {"#SBATCH --nodes=2", "#SBATCH --time=2:00:00", "#SBATCH --gpus-per-node=4"} <= set(lines)
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    (line,) = (line for line in lines if " train sft " in line)
    assert f"'{tmp_path / 'my run'}'" in line and "--emit" not in line and "--hours" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("/nonexistent", [], "/nonexistent"),
        ("", ["--set", "trl.optm=1"], "trl: SFTConfig has no option 'optm'; did you mean 'optim'?"),
        ("", ["--set", "trl.weight_decay=x"], "trl: weight_decay = 'x'"),
        ("", ["--set", "trl.hub_token=hf_secret"], "trl: 'hub_token' would be written into the files"),
        ("", ["--hours", "0.1"], "--hours"),
    ],
    ids=["dataset", "name", "value", "token", "hours"],
)
def test_no_job_script_is_printed_for_what_training_would_refuse(
    dataset: str, options: list[str], message: str, tiny: Path
) -> None:
    words = ["train", "sft", dataset or str(tiny), "-o", "run", "--nproc", "8", "--nodes", "2", "--emit", "slurm"]
    done = CliRunner().invoke(app, [*words, *options])
    assert done.exit_code != 0 and done.stdout == ""
    assert message in done.stderr or message in str(done.exception)
    assert "hf_secret" not in done.output
