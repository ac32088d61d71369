"""`train` on two processes ends as on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from gymtrl import FormatSftSettings, TrainSftSettings, UserError, format_sft, train
from tiny import filtered, metrics, sums, tiny_llama


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model = tiny_llama(folder / "model", smollm2_dir)
    rows = sums(12)
    source = filtered(folder / "filtered", rows[:16], rows[16:])
    return format_sft(source, folder / "dataset", FormatSftSettings(model=str(model))).path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "engine"), [("lora", "ddp"), pytest.param("full", "ddp", marks=pytest.mark.long), ("full", "fsdp2")]
)
def test_two_processes_end_as_one(method: str, engine: str, dataset: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        settings = TrainSftSettings(
            method=method, engine=engine, nproc=count, max_steps=4, effective_batch=4, learning_rate=0.01, lora_r=4
        )
        result = train(dataset, tmp_path / str(count), settings)
        assert result.plan.micro_batch * result.plan.accumulation * count == 4
        runs[count] = (metrics(result.path), result, load_file(result.model / "model.safetensors"))
    one, two = runs[1], runs[2]
    assert [line["loss"] for line in two[0]] == pytest.approx([line["loss"] for line in one[0]], abs=1e-5)
    assert two[1].eval_before == pytest.approx(one[1].eval_before, abs=1e-5)
    assert two[1].eval_after == pytest.approx(one[1].eval_after, abs=1e-5)
    assert max(float((two[2][key] - one[2][key]).abs().max()) for key in one[2]) <= 1e-4


def test_more_processes_than_rows_divide_into_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no multiple of 3") as caught:
        train(dataset, tmp_path / "run", TrainSftSettings(nproc=3, effective_batch=4))
    assert caught.value.remedy == "set effective_batch to 6"
    with pytest.raises(UserError, match="needs GPUs"):
        train(dataset, tmp_path / "run", TrainSftSettings(nproc=2, engine="zero3"))
