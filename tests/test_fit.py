"""What is left open is chosen so that a run fits, what was set stays, and what was traded is said."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.training.fit import PROCESS_BYTES, SHARE, FitRequest, available_memory, fit, longest_that_fits
from gymtrl.training.machine import ADDRESS_SPACE, Gpu, Machine, container_memory, machine
from gymtrl.training.memory import ModelShape, RunShape, estimate
from gymtrl.training.plan import plan
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.sft import SFT

GIB = 2**30
# SmolLM2-135M
MODEL = ModelShape(
    **{"weights": 134_515_008, "linear": 106_168_320, "linear_inputs": 149_760, "linear_outputs": 155_520},
    **{"linears": 210, "layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64},
    **{"intermediate": 1536, "vocabulary": 49_152, "normed_heads": False, "tied": True, "stored_bytes": 4},
)
REQUEST = FitRequest(MODEL, objective="sft", method="lora", longest=2048, effective_batch=16, cuda=False)


def cpu(gib: float) -> Machine:
    return Machine(memory=round(gib * GIB), limit="memory", cores=2)


def gpu(gib: float, *, bfloat16: bool = True) -> Machine:
    card = Gpu("a card", total=round(gib * GIB), free=round(gib * GIB), bfloat16=bfloat16)
    return Machine(memory=64 * GIB, limit="memory", cores=8, gpus=(card,))


def test_a_cpu_with_room_takes_one_row_at_a_time_and_trades_nothing() -> None:
    found = fit(REQUEST, cpu(64))
    assert (found.micro_batch, found.accumulation, found.gradient_checkpointing) == (1, 16, False)
    assert (found.dtype, found.traded) == ("float32", ())
    assert found.available == round(SHARE * 64 * GIB) - PROCESS_BYTES["cpu"]
    assert found.memory == estimate(MODEL, RunShape("sft", "lora", 2048, 1, 16, False))


def test_activations_are_computed_again_where_they_would_not_fit() -> None:
    found = fit(REQUEST, cpu(6))
    assert found.gradient_checkpointing and found.memory.total <= found.available
    (said,) = found.traded
    assert "gradient checkpointing on: saves 2." in said and "GiB" in said and "fifth of the speed" in said


def test_a_gpu_takes_as_many_rows_as_fit_and_keeps_the_effective_batch() -> None:
    request = replace(REQUEST, cuda=True)
    found = [fit(request, gpu(gib)) for gib in (80, 11, 4, 2)]
    choices = [(one.micro_batch, one.gradient_checkpointing) for one in found]
    assert choices[:3] == [(8, False), (4, False), (8, True)]
    assert choices[3][0] < 8 and choices[3][1]
    for one in found:
        assert one.micro_batch * one.accumulation == 16 and one.memory.total <= one.available
    assert not any("in place of" in said for said in found[0].traded)
    assert any("4 rows at once in place of 8: saves" in said for said in found[1].traded)


def test_frozen_weights_are_rounded_on_a_gpu_alone() -> None:
    for request, where, dtype in (
        (replace(REQUEST, cuda=True), gpu(80), "bfloat16"),
        (replace(REQUEST, cuda=True, autocast=False), gpu(80, bfloat16=False), "float32"),
        (replace(REQUEST, cuda=True, method="full"), gpu(80), "float32"),
        (replace(REQUEST, cuda=True, dtype="float32"), gpu(80), "float32"),
        (REQUEST, cpu(64), "float32"),
    ):
        found = fit(request, where)
        assert found.dtype == dtype
        assert any("bfloat16" in said for said in found.traded) == (dtype == "bfloat16")


def test_a_gpu_without_bfloat16_computes_in_float32() -> None:
    old, new = (
        plan(TrainSftSettings(), SFT, rows=100, longest=2048, shape=MODEL, machine=gpu(80, bfloat16=bfloat16))
        for bfloat16 in (False, True)
    )
    assert (old.plan.cuda, old.plan.autocast, old.plan.dtype) == (True, False, "float32")
    assert (new.plan.cuda, new.plan.autocast, new.plan.dtype) == (True, True, "bfloat16")
    assert any("does not compute in bfloat16" in note for note in old.notes)
    assert not any("does not compute in bfloat16" in note for note in new.notes)
    assert 1.5 * new.memory.activations < old.memory.activations < 2 * new.memory.activations


def test_what_was_set_stays() -> None:
    request = replace(REQUEST, micro_batch=4, gradient_checkpointing=True)
    found = fit(request, cpu(64))
    assert (found.micro_batch, found.accumulation, found.gradient_checkpointing) == (4, 4, True)
    assert found.traded == ()


def test_processes_share_the_effective_batch_and_the_memory() -> None:
    found = fit(replace(REQUEST, processes=2), cpu(64))
    assert (found.micro_batch, found.accumulation) == (1, 8)
    assert found.available == round(SHARE * 32 * GIB) - PROCESS_BYTES["cpu"]
    with pytest.raises(UserError, match="cannot be divided"):
        fit(replace(REQUEST, processes=3), cpu(64))
    with pytest.raises(UserError, match="micro_batch 3 on 1 process"):
        fit(replace(REQUEST, micro_batch=3), cpu(64))


def test_nodes_share_no_memory() -> None:
    found = fit(replace(REQUEST, processes=4, nodes=2), cpu(64))
    assert found.available == round(SHARE * 32 * GIB) - PROCESS_BYTES["cpu"]


def test_only_the_gpus_of_the_run_count() -> None:
    free, busy = gpu(80).gpus[0], replace(gpu(1).gpus[0], name="a busy card", bfloat16=False)
    where = replace(gpu(80), gpus=(free, busy))
    request = replace(REQUEST, cuda=True)
    assert fit(request, where) == fit(request, gpu(80))
    assert fit(request, where).dtype == "bfloat16"
    with pytest.raises(UserError, match="a busy card"):
        fit(replace(request, processes=2), where)


def test_each_process_needs_a_gpu_of_its_own() -> None:
    where = replace(gpu(80), gpus=2 * gpu(80).gpus)
    with pytest.raises(UserError, match=r"4 processes on a node with 2 GPU\(s\)") as caught:
        fit(replace(REQUEST, cuda=True, processes=8, nodes=2), where)
    assert caught.value.remedy == "set nproc to 4"
    assert fit(replace(REQUEST, cuda=True, processes=4, nodes=2), where).accumulation == 1


def test_a_large_model_fits_where_the_processes_divide_it() -> None:
    # Llama 3.1 8B
    large = ModelShape(
        **{"weights": 8_030_261_248, "linear": 6_979_321_856, "linear_inputs": 1_179_648, "linear_outputs": 1_343_488},
        **{"linears": 224, "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128},
        **{"intermediate": 14_336, "vocabulary": 128_256, "normed_heads": False, "tied": False, "stored_bytes": 2},
    )
    where = replace(gpu(80), gpus=8 * gpu(80).gpus)
    request = FitRequest(large, "sft", "full", longest=4096, effective_batch=32, cuda=True, processes=8)
    with pytest.raises(UserError) as caught:
        fit(request, where)
    assert "set engine to fsdp2" in (caught.value.remedy or "")
    for engine in ("fsdp2", "zero3"):
        found = fit(replace(request, engine=engine), where)
        # An eighth of 8 B weights in float32, two layers and the embeddings and the head in bfloat16.
        assert 6 * GIB < found.memory.weights < 8 * GIB
        assert found.memory.optimizer == large.weights
    # FSDP2 divides gradients at the end of a step, ZeRO-3 with each micro-batch.
    accumulated = {"micro_batch": 1, "effective_batch": 16}
    fsdp2, zero3 = (fit(replace(request, engine=e, **accumulated), where).memory for e in ("fsdp2", "zero3"))
    assert (fsdp2.gradients, zero3.gradients) == (2 * large.weights, large.weights // 2)
    # Compared with a second model, that is divided, too.
    found = fit(replace(request, engine="fsdp2", objective="dpo"), where)
    assert found.memory.reference == large.weights // 2


def test_kto_takes_no_fewer_rows_than_it_compares() -> None:
    request = replace(REQUEST, objective="kto", least_micro=4)
    assert fit(request, cpu(64)).micro_batch == 4
    with pytest.raises(UserError, match="micro_batch is 2, and kto takes 4 rows at once at the least") as caught:
        fit(replace(request, micro_batch=2), cpu(64))
    assert "4 or more" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("changes", "gib", "remedy"),
    [
        ({"gradient_checkpointing": False}, 6, "leave gradient_checkpointing unset"),
        ({"micro_batch": 16, "longest": 1024}, 6, "leave micro_batch unset"),
        ({"micro_batch": 16, "gradient_checkpointing": False}, 6, "leave micro_batch and gradient_checkpointing unset"),
        ({"method": "full"}, 5.8, "set method to lora"),
        ({"longest": 60_000}, 8, "rows of up to "),
        ({}, 0.5, "a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(changes: dict[str, Any], gib: float, remedy: str) -> None:
    request = replace(REQUEST, **changes)
    with pytest.raises(UserError, match="of memory at the least") as caught:
        fit(request, cpu(gib))
    assert remedy in (caught.value.remedy or "")


def test_the_longest_row_that_fits_is_the_longest() -> None:
    request = replace(REQUEST, longest=60_000)
    available = available_memory(request, cpu(8))
    longest = longest_that_fits(request, available, "float32")
    assert fit(replace(request, longest=longest), cpu(8)).gradient_checkpointing
    with pytest.raises(UserError) as caught:
        fit(replace(request, longest=longest + 1), cpu(8))
    assert f"max_length {longest}" in (caught.value.remedy or "")


def test_without_a_gpu_none_is_used() -> None:
    with pytest.raises(UserError, match="no GPU"):
        fit(replace(REQUEST, cuda=True), cpu(8))


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_group_of_the_container_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    two = tmp_path / "two"
    group(two / "a" / "b", memory__max="max", memory__current=5, memory__stat="inactive_file 1")
    group(two / "a", memory__max=1000, memory__current=700, memory__stat="anon 1\ninactive_file 100")
    own.write_text("0::/a/b\n")
    assert container_memory(two, own) == 400
    group(two / "a" / "b", memory__max=300)
    assert container_memory(two, own) == 296

    one = tmp_path / "one"
    files: dict[str, object] = {"memory__usage_in_bytes": 100, "memory__stat": "total_inactive_file 20"}
    group(one / "memory", memory__limit_in_bytes=2**63 - 4096, **files)
    own.write_text("4:memory:/host/path\n0::/\n")
    assert container_memory(one, own) is None
    group(one / "memory", memory__limit_in_bytes=500)
    assert container_memory(one, own) == 420
    assert container_memory(tmp_path / "absent", tmp_path / "none") is None


def test_this_machine_has_memory_and_cores() -> None:
    found = machine()
    assert found.memory > 0 and found.cores > 0 and found.gpus == ()
    code = "import sys, gymtrl.training.machine as m; m.machine(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gpus_are_asked_in_a_process_of_its_own() -> None:
    code = (
        "import gymtrl.training.machine as m, torch; found = m.machine(gpus=True); "
        "print(len(found.gpus), torch.cuda.device_count(), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, there, initialized = done.stdout.split()
    assert (found, initialized) == (there, "False")
    asked = subprocess.run(
        [sys.executable, "-P", "-m", "gymtrl.training.machine"], capture_output=True, text=True, check=True
    )
    assert len(json.loads(asked.stdout)) == int(there)


def test_a_limit_of_the_address_space_counts() -> None:
    limit = ADDRESS_SPACE + 123 * 2**20
    code = "import gymtrl.training.machine as m; found = m.machine(); print(found.limit, found.memory)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stdout.split() == ["ulimit", "-v", str(123 * 2**20)]
