"""What can be wrong with data, model, adapter and disk: each is told with a remedy, and nothing half-written stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from gymtrl import (
    FormatSftSettings,
    RunError,
    TrainDpoSettings,
    TrainGrpoSettings,
    TrainKtoSettings,
    TrainSftSettings,
    UserError,
    format_sft,
    train,
)
from gymtrl.models.adapter import require_own_adapter
from gymtrl.models.fingerprint import load_config, tokenizer_bytes
from gymtrl.training.memory import model_shape
from gymtrl.training.settings import TrainSettings
from gymtrl.training.space import SPARE_BYTES, room_needed, sizes_of
from tiny import filtered, metrics, sums, tiny_llama

_GYMTRL = [sys.executable, "-m", "gymtrl"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A folder with a random `model`, a `dataset` made for it and an `adapter` trained on it."""
    folder = tmp_path_factory.mktemp("errors")
    model = tiny_llama(folder / "model", smollm2_dir)
    rows = sums(16)
    source = filtered(folder / "filtered", rows[:28], rows[28:])
    format_sft(source, folder / "dataset", FormatSftSettings(model=str(model)))
    run = train(folder / "dataset", folder / "run", settings(max_steps=1))
    assert run.adapter is not None
    run.adapter.rename(folder / "adapter")
    return folder


def settings(**fields: Any) -> TrainSftSettings:
    return TrainSftSettings(**({"max_steps": 4, "effective_batch": 4, "lora_r": 4, "lora_alpha": 4} | fields))


def changed(folder: Path, to: Path, change: Callable[[Path], object]) -> Path:
    """A copy of a folder in which something is otherwise."""
    shutil.copytree(folder, to)
    change(to)
    return to


def refused(dataset: Path, chosen: TrainSettings, out: Path) -> UserError:
    """How training is refused; not a file may be there afterwards."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        train(dataset, out, chosen)
    assert sorted(out.parent.iterdir()) == before
    assert caught.value.remedy
    return caught.value


def without_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()


def with_fewer_merges(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_foreign_template(model: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|endoftext|>"))


def with_config(**values: Any) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def names(base: str) -> Callable[[Path], object]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))

    return change


def with_cut_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (without_tokenizer, "the model folder {model} has no tokenizer: tokenizer.json, ", "cp MODEL/*token* "),
        (
            with_fewer_merges,
            "made for the tokenizer of {base}, and {model} has another",
            "run 'gymtrl format sft' again with --model {model}",
        ),
        (
            with_foreign_template,
            "made for the chat template of {base}, and {model} has another",
            "run 'gymtrl format sft' again with --model {model}",
        ),
        (lambda m: (m / "model.safetensors").unlink(), "weights of {model} cannot be read: ", "into {model} anew"),
        (with_cut_weights, "weights of {model} cannot be read: ", "into {model} anew"),
        (
            with_config(num_hidden_layers=3),
            "{model} lacks 9 of its weights, such as model.layers.2.",
            "into {model} anew",
        ),
        (with_config(intermediate_size=32), "{model}: config.json does not belong to the weights", "--model"),
        (lambda m: (m / "config.json").unlink(), "{model} holds no model: it has no config.json", "'model' of a"),
        (lambda m: (m / "config.json").write_text("{"), "{model}", "model folder"),
    ],
    ids=["tokenizer", "merges", "template", "no-weights", "cut", "layers", "shapes", "no-config", "config"],
)
def test_a_model_that_is_not_whole_or_not_the_datasets(
    change: Callable[[Path], object], message: str, remedy: str, made: Path, tmp_path: Path
) -> None:
    names = {"base": made / "model", "model": changed(made / "model", tmp_path / "model", change)}
    error = refused(made / "dataset", settings(model=str(names["model"])), tmp_path / "run")
    assert message.format_map(names) in error.message
    assert remedy.format_map(names) in (error.remedy or "")


def test_an_adapter_is_no_model_and_fits_only_its_own(made: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    adapter, base, run = made / "adapter", made / "model", tmp_path / "run"
    error = refused(made / "dataset", settings(model=str(adapter)), run)
    assert error.message == f"{adapter} is a LoRA adapter of {base}, not a model"
    assert f"--model {base} --adapter {adapter}" in (error.remedy or "")

    wide = tiny_llama(tmp_path / "wide", smollm2_dir, hidden_size=16)
    error = refused(made / "dataset", settings(model=str(wide), adapter=str(adapter)), run)
    assert error.message == f"the adapter {adapter} was trained on {base}, not on {wide}"
    assert error.remedy == f"give --model {base}, or an adapter of {wide}"

    (tmp_path / "elsewhere").mkdir()
    same_name = wide.rename(tmp_path / "elsewhere" / "model")
    error = refused(made / "dataset", settings(model=str(same_name), adapter=str(adapter)), run)
    assert error.message == f"the adapter {adapter} was trained on {base}, not on {same_name}"

    # Of a model that is elsewhere, or on the hub, there is only the name to go by, and then the shapes.
    moved = changed(adapter, tmp_path / "moved", names("/gone/model"))
    error = refused(made / "dataset", settings(model=str(same_name), adapter=str(moved)), run)
    assert f"the adapter {moved} does not fit {same_name}: model.layers.0." in error.message
    assert "(/gone/model)" in (error.remedy or "")
    require_own_adapter(moved, str(base), load_config(str(base)))

    error = refused(made / "dataset", settings(adapter=str(base)), run)
    assert f"{base} is no LoRA adapter" in error.message


@pytest.mark.parametrize(
    ("chosen", "verb"), [(TrainDpoSettings(), "dpo"), (TrainKtoSettings(), "kto"), (TrainGrpoSettings(), "grpo")]
)
def test_a_dataset_for_another_objective(chosen: TrainSettings, verb: str, made: Path, tmp_path: Path) -> None:
    error = refused(made / "dataset", chosen, tmp_path / "run")
    assert "train-00000-of-00001.parquet has no column " in error.message
    assert error.remedy == f"it was made by 'format sft'; make one with 'gymtrl format {verb}'"


def rows_file(dataset: Path) -> Path:
    return dataset / "data" / "train-00000-of-00001.parquet"


def no_rows(dataset: Path) -> None:
    pq.write_table(pq.read_table(rows_file(dataset)).slice(0, 0), rows_file(dataset))


def half_of_it(dataset: Path) -> None:
    rows_file(dataset).rename(dataset / "data" / "train-00000-of-00002.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_rows, "holds no training rows"),
        (lambda d: shutil.rmtree(d / "data"), "holds no training rows"),
        (half_of_it, "holds 1 of its 2 train files"),
        (lambda d: rows_file(d).write_bytes(rows_file(d).read_bytes()[:300]), "cannot be read: "),
        (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
        (lambda d: (d / "manifest.json").write_text("{}"), "not a manifest"),
    ],
    ids=["rows", "data", "files", "cut", "manifest", "emptied"],
)
def test_a_dataset_that_is_empty_or_damaged(
    change: Callable[[Path], object], message: str, made: Path, tmp_path: Path
) -> None:
    dataset = changed(made / "dataset", tmp_path / "dataset", change)
    error = refused(dataset, settings(), tmp_path / "run")
    assert str(dataset) in error.message and message in error.message


def test_the_command_line_tells_it_with_its_exit_status(made: Path, tmp_path: Path) -> None:
    model = changed(made / "model", tmp_path / "model", with_foreign_template)
    command = [*_GYMTRL, "train", "sft", str(made / "dataset"), "-o", str(tmp_path / "run"), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: the dataset was made for the chat template of {made / 'model'}, and {model} has another",
        f"remedy: run 'gymtrl format sft' again with --model {model}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 128 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Takes what is free, to the last page; returns the file that does."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12):
            try:
                while stream.write(bytes(size)):
                    pass
            except OSError:
                continue
    return filler


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.long), "full"])
def test_a_disk_that_fills_while_it_trains(method: str, made: Path, tmp_path: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    options = {"method": method, "max_steps": 60, "save_steps": 3, "learning_rate": 0.01}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [*_GYMTRL, "train", "sft", str(made / "dataset"), "-o", str(out), "--effective-batch", "4", *words]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    sealed = "checkpoints/checkpoint-3/sealed.json"
    while child.poll() is None and not (small_disk / ".run.partial" / sealed).exists():
        time.sleep(0.005)
    filler = fill(small_disk)
    _, told = child.communicate()
    assert child.returncode == 3, told
    error, remedy = told.splitlines()[-2:]
    assert error.startswith(f"error: the disk is full: {small_disk} has ") and "a checkpoint takes " in error
    assert remedy.startswith("remedy: free ") and "run it again, to go on from the last checkpoint" in remedy
    print(error, remedy, sep="\n")
    assert "Traceback" not in told
    assert not out.exists()
    checkpoints = list((small_disk / ".run.partial" / "checkpoints").glob("checkpoint-*"))
    assert checkpoints and all((path / "sealed.json").exists() for path in checkpoints)

    filler.unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line).get("event") for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(event and event.startswith("continued from step ") for event in events)
    chosen = TrainSftSettings(effective_batch=4, **options)
    whole = train(made / "dataset", tmp_path / "whole", chosen).path
    assert [line["loss"] for line in metrics(out)] == pytest.approx([line["loss"] for line in metrics(whole)])
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, out))
    assert all(float((a[key] - b[key]).abs().max()) <= 1e-6 for key in a)


def test_a_disk_that_is_too_small_is_told_before_training(made: Path, tmp_path: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(80 * 2**20))
    with pytest.raises(RunError, match=f"training needs [0-9]+ MiB in {small_disk}, and 48 MiB are free") as caught:
        train(made / "dataset", small_disk / "run", settings())
    assert (caught.value.remedy or "").startswith("free ")
    filler.unlink()
    assert train(made / "dataset", small_disk / "run", settings()).path.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "engine"),
    [*(pytest.param(method, "ddp", marks=pytest.mark.long) for method in ("lora", "full")), ("full", "fsdp2")],
)
def test_the_space_that_is_asked_for_is_what_a_run_takes(
    method: str, engine: str, made: Path, tmp_path: Path, smollm2_dir: Path
) -> None:
    model = tiny_llama(tmp_path / "model", smollm2_dir, hidden_size=64, intermediate_size=128)
    processes = 1 if engine == "ddp" else 2
    chosen = settings(method=method, engine=engine, nproc=processes, model=str(model), lora_r=64, save_steps=1)
    child = subprocess.Popen(
        [sys.executable, "-c", _TRAIN, str(made / "dataset"), str(tmp_path / "run"), chosen.model_dump_json()],
        stderr=subprocess.DEVNULL,
    )
    most = 0
    while child.poll() is None:
        most = max(most, held(tmp_path / ".run.partial"))
        time.sleep(0.005)
    assert child.returncode == 0
    lora, shape = method == "lora", model_shape(load_config(str(model)))
    sizes = sizes_of(shape, rank=64 if lora else None, divided=processes > 1, tokenizer=tokenizer_bytes(str(model)))
    needed = room_needed(sizes, lora=lora).run
    print(f"{method} {engine}: held {most / 2**20:.1f} MiB, asked for {needed / 2**20:.1f} MiB")
    assert 0.95 * most <= needed - SPARE_BYTES <= 1.3 * most


_TRAIN = """
import sys
from pathlib import Path
from gymtrl import TrainSftSettings, train
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
"""


def held(folder: Path) -> int:
    """Bytes of the files below a folder that changes meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total
