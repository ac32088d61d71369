"""Several processes train as one does with the same rows a step; their count is checked, and they end together.

On CPU, with gloo. What is several nodes here is several torchruns on one machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler

import distributed_worker
from gymtrl import RunError, UserError
from gymtrl.processes import Supervised
from gymtrl.training.launch import WORKER, Launch, worker_command, worker_environment
from gymtrl.training.ranks import require_processes
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.slurm import RESTARTS, job_script, meeting_point, slurm_script
from test_processes import tagged, wait_for

TESTS = Path(__file__).parent
ONE, TWO, SHARDED = Launch(1, cuda=False), Launch(2, cuda=False), Launch(2, cuda=False, engine="fsdp2")
WORDS = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that knows 64 words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))
    special = {"unk_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,  # far from even odds, so that a wrong token shows
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ids(n: int) -> list[int]:
    """Rows of different lengths."""
    return [3 + (37 * n + 13 * place) % (WORDS - 3) for place in range(5 + 7 * n % 11)]


def sft_rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": ids(n), "labels": [-100] * (1 + n % 3) + ids(n)[1 + n % 3 :]} for n in range(count)]


def dpo_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        row: dict[str, Any] = {"prompt_ids": [5, 6, 7]}
        for side, said in (("chosen", ids(n)), ("rejected", ids(n + 1)[:-2])):
            row |= {f"{side}_ids": said, f"{side}_mask": [place % 4 != 1 for place in range(len(said))]}
        rows.append(row)
    return rows


def job(name: str, launch: Launch, objective: str = "sft", *, rows: int = 8, **more: Any) -> dict[str, Any]:
    """Eight rows in two steps of four, however many processes share them."""
    made = sft_rows(rows) if objective == "sft" else dpo_rows(rows)
    options = {"gradient_accumulation_steps": 4 // launch.processes} | more.pop("options", {})
    return {"name": name, "objective": objective, "rows": made, "options": options} | more


def jobs(launch: Launch) -> list[dict[str, Any]]:
    regrouped = {"train_sampling_strategy": "batch_rebalance", "per_device_train_batch_size": 2}
    made = [
        job("sft", launch, options={"save_strategy": "steps", "save_steps": 1}),
        job("resumed", launch, resume="sft/checkpoints/checkpoint-1"),
        job("lora", launch, lora=True),
        job("dpo", launch, "dpo", options={"loss_type": ["sigmoid", "sft"]}),
        job("regrouped", launch, rows=16, options=regrouped),
    ]
    refused = [job("evaluated", launch, evaluate_first=True), job("other", launch, engine="fsdp2")]
    return made + refused if launch == TWO else made


def described(folder: Path, model: Path, launch: Launch) -> Path:
    work = {"model": str(model), "engine": launch.engine, "processes": launch.processes, "jobs": jobs(launch)}
    (folder / "job.json").write_text(json.dumps(work))
    return folder


def started(folder: Path, launch: Launch, module: str, **env: str) -> Supervised:
    """The command as it is but for the module that the processes run."""
    command = worker_command(folder, launch)
    command[command.index(WORKER)] = module
    path = f"{TESTS}:{TESTS.parent / 'src'}"
    return Supervised(command, log=folder / "log", env=worker_environment(launch) | {"PYTHONPATH": path} | env, grace=5)


def finished(process: Supervised, seconds: float = 300) -> int:
    end = time.monotonic() + seconds
    while (code := process.exit_code()) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert code is not None, process.tail()
    return code


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = described(tmp_path_factory.mktemp("one"), model, ONE)
    distributed_worker.main(folder)
    return folder


def trained(folder: Path, model: Path, launch: Launch) -> Path:
    with started(described(folder, model, launch), launch, "distributed_worker") as process:
        assert finished(process) == 0, process.tail(40)
    return folder


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("two"), model, TWO)


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("sharded"), model, SHARDED)


def lines(folder: Path, name: str, number: str) -> list[float]:
    told = json.loads((folder / name / "result.json").read_text())["lines"]
    return [line[number] for line in told if number in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").exists():
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).state_dict()
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same(one: Path, other: Path, name: str) -> None:
    for number in ("loss", "grad_norm", "eval_loss", "num_tokens"):
        expected = lines(one, name, number)
        assert expected and lines(other, name, number) == pytest.approx(expected, abs=1e-5), number
    expected = weights(one / name / "model")
    found = weights(other / name / "model")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-5) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "resumed", "lora", "dpo", "regrouped"])
def test_two_processes_train_as_one_with_doubled_accumulation(one: Path, two: Path, name: str) -> None:
    assert_same(one, two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "resumed", "lora", "dpo", "regrouped"])
def test_sharded_over_two_processes_a_model_trains_the_same(one: Path, sharded: Path, name: str) -> None:
    assert_same(one, sharded, name)


@pytest.mark.slow
def test_a_sharded_checkpoint_loads_as_it_is(one: Path, sharded: Path) -> None:
    expected = weights(one / "sft" / "model")
    found = weights(sharded / "sft" / "checkpoints" / "checkpoint-2")
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-5) for key in expected)
    assert {file.name for file in (sharded / "sft" / "checkpoints" / "checkpoint-2").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.slow
def test_training_apart_is_refused(two: Path) -> None:
    told = {name: json.loads((two / name / "result.json").read_text())["refused"] for name in ("evaluated", "other")}
    assert told["evaluated"] == "the processes were to share the model by ddp, and do so by none"
    assert told["other"] == "the processes were to share the model by fsdp2, and do so by ddp"


def test_fewer_processes_than_asked_for_are_refused() -> None:
    require_processes(1)
    with pytest.raises(RunError, match="2 processes were asked for, and 1 run together") as caught:
        require_processes(2)
    assert "gymtrl train" in (caught.value.remedy or "")


def test_when_one_process_is_killed_all_end(tmp_path: Path) -> None:
    (tmp_path / "task").write_text("die")
    tag = uuid.uuid4().hex
    with started(tmp_path, TWO, "small_worker", TEST_TAG=tag) as process:
        assert finished(process) == 1
    assert tagged(tag) == []


def test_stopping_ends_every_process(tmp_path: Path) -> None:
    (tmp_path / "task").write_text("sleep")
    tag = uuid.uuid4().hex
    with started(tmp_path, TWO, "small_worker", TEST_TAG=tag):
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(tagged(tag)) >= 3
    assert wait_for(0, tag) == 0


def test_one_process_is_started_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert worker_command(tmp_path, ONE) == [sys.executable, "-m", WORKER, str(tmp_path)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert worker_environment(Launch(1, cuda=True))["CUDA_VISIBLE_DEVICES"] == "3"
    assert worker_environment(Launch(2, cuda=True))["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_another_launcher_leaves_nothing_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "PMI_SIZE"]
    for name in foreign:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert not set(foreign) & worker_environment(ONE).keys()
    assert worker_environment(ONE)["OMP_NUM_THREADS"] == "5"
    assert worker_environment(TWO)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert worker_environment(TWO)["OMP_NUM_THREADS"] == "2"
    assert worker_environment(SHARDED)["FSDP_VERSION"] == "2"
    assert "ACCELERATE_USE_CPU" not in worker_environment(Launch(4, cuda=True, engine="fsdp2"))


def test_a_job_on_cpus_asks_for_no_gpus() -> None:
    for trl, gpus in (({}, True), ({"use_cpu": True}, False)):
        script = job_script(["train", "sft", "d"], TrainSftSettings(nproc=4, nodes=2, trl=trl), name="job", hours=1)
        assert ("--gpus-per-node" in script) == gpus


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_zero3_without_deepspeed_is_refused() -> None:
    with pytest.raises(UserError, match="needs DeepSpeed"):
        worker_environment(Launch(4, cuda=True, engine="zero3"))


def test_rows_that_do_not_divide_are_taken_twice() -> None:
    from accelerate.data_loader import BatchSamplerShard

    batches = BatchSampler(range(7), batch_size=1, drop_last=False)
    shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in range(2)]
    assert shares == [[[0], [2], [4], [6]], [[1], [3], [5], [0]]]


@pytest.mark.parametrize("wrong", [{"processes": 3, "nodes": 2}, {"processes": 0}, {"processes": 2, "engine": "zero3"}])
def test_what_cannot_be_started_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Launch(**{"cuda": False} | wrong)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands on one machine: as many tasks as nodes, and a note of what is queued again."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    program(folder / "scontrol", f'[ "$1" = show ] && printf "localhost\\nother\\n"; echo "$@" >>{folder}/asked')
    program(
        folder / "srun",
        'while [ "${1#--}" != "$1" ]; do case $1 in --nodes=*) nodes=${1#--nodes=};; esac; shift; done\n'
        'for node in $(seq "$nodes"); do "$@" & done\nfor task in $(jobs -p); do wait "$task" || exit 1; done\n',
    )
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    return folder


@pytest.mark.slow
def test_processes_of_two_nodes_meet(slurm: Path, tmp_path: Path) -> None:
    host, port = meeting_point()
    assert (host, (slurm / "asked").read_text()) == ("localhost", "show hostnames node[1-2]\n")
    (tmp_path / "task").write_text("meet")
    with started(tmp_path, Launch(4, cuda=False, nodes=2, host=host, port=port), "small_worker") as process:
        assert finished(process) == 0, process.tail(40)
    assert [(tmp_path / f"met-{rank}").read_text() for rank in range(4)] == ["4"] * 4


def test_without_slurm_there_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match="no Slurm job") as caught:
        meeting_point()
    assert "--emit slurm" in (caught.value.remedy or "")


EVIL = ["train", "sft", "a b", "$(touch pwned)", "`touch pwned`", "it's", '"', "line\nbreak; touch pwned", "{x}", "-o"]


def test_a_job_script_runs_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "it's $(touch pwned)"
    folder.mkdir()
    python = program(tmp_path / "py thon", 'printf "%s\\0" "$PWD" "$@" >told; exit 7')
    monkeypatch.setattr(sys, "executable", str(python))
    launch = Launch(16, cuda=True, nodes=2, engine="fsdp2")
    text = slurm_script(EVIL, launch, name="a\n#SBATCH --uid=0", folder=folder, hours=1.5)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options[0] == "#SBATCH --job-name=a-SBATCH---uid-0"
    assert {"#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --time=1:30:00"} < set(options)
    assert "gpus" not in slurm_script(EVIL, TWO, name="n", folder=folder, hours=1)
    done = subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (7, "")
    assert (folder / "told").read_text().split("\0")[:-1] == [str(folder), "-m", "gymtrl", *EVIL]
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("sent", "restarts", "queued"), [("USR1", 0, True), ("USR1", RESTARTS, False), ("TERM", 0, False)]
)
def test_at_the_time_limit_the_run_stops_and_is_queued_again(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: str, restarts: int, queued: bool
) -> None:
    stand_in = "trap 'sleep 0.3; touch stopped; exit 130' TERM\ntouch running\nfor i in {1..300}; do sleep 0.1; done"
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "python", stand_in)))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    script = tmp_path / "job.sh"
    script.write_text(slurm_script(["train"], TWO, name="n", folder=tmp_path, hours=1))
    batch = subprocess.Popen(["bash", str(script)])
    end = time.monotonic() + 60
    while not (tmp_path / "running").exists() and time.monotonic() < end:
        time.sleep(0.05)
    batch.send_signal(getattr(signal, f"SIG{sent}"))
    assert batch.wait(60) != 0
    assert (tmp_path / "stopped").exists()
    asked = (slurm / "asked").read_text() if (slurm / "asked").exists() else ""
    assert asked == (f"requeue {os.getpid()}\n" if queued else "")
