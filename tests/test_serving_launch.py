"""A checkpoint in processes of its own: what serves it, that it is ready and warm, watched, and gone at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gymtrl.errors import RunError, UserError
from gymtrl.gym.servers import free_port
from gymtrl.serving.checkpoint import Checkpoint
from gymtrl.serving.launch import serving
from gymtrl.serving.vllm import Vllm, find_vllm, vllm_command, vllm_environment
from test_serving_http import TOOLS, environment, make_model

VLLM = Path(os.environ.get("GYMTRL_VLLM", Path(__file__).parent.parent / ".venv-vllm" / "bin" / "vllm"))
"""Where `make check-vllm` puts it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "chain")


def choice(url: str, text: str = "w0", **fields: object) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 3, **fields}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


def ask(url: str, text: str = "w0", **fields: object) -> dict[str, Any]:
    message: dict[str, Any] = choice(url, text, **fields)["message"]
    return message


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_light_endpoint_is_up_for_the_block(model: Path, tmp_path: Path) -> None:
    port, told = free_port(), set()
    with serving(
        model, name="m", port=port, logs=tmp_path, backend="light", tick=lambda server, _: told.add(server)
    ) as endpoint:
        assert (endpoint.url, endpoint.server) == (f"http://127.0.0.1:{port}/v1", "the light endpoint")
        assert ask(endpoint.url, model="m")["content"] == "w1 w2 w3"
        endpoint.check()
        with (
            pytest.raises(RunError, match="cannot listen"),
            serving(model, name="m", port=port, logs=tmp_path / "other", backend="light"),
        ):
            pass
        (child,) = [c for c in psutil.Process().children(recursive=True) if "gymtrl.serving" in c.cmdline()[:4]]
        child.kill()
        with pytest.raises(RunError, match="the light endpoint for"):
            for _ in range(100):
                endpoint.check()
                time.sleep(0.1)
    assert told == {"the light endpoint"} and not answers(port)
    assert "serving m at" in (tmp_path / "endpoint.log").read_text()


def test_an_engine_that_broke_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymtrl.serving.launch._HEALTH_SECONDS", 0.0)
    broken = shutil.copytree(model, tmp_path / "broken")
    tokenizer = AutoTokenizer.from_pretrained(broken)
    # A token that the model has no embedding for.
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save_pretrained(broken)
    with serving(broken, name="m", port=free_port(), logs=tmp_path, backend="light") as endpoint:
        endpoint.check()
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            ask(endpoint.url, "more8")
        with pytest.raises(RunError, match=r"can generate no more.*generation failed"):
            endpoint.check()


def test_what_cannot_be_served_says_why(model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "t5"}')
    opened = serving(tmp_path / "broken", name="m", port=free_port(), logs=tmp_path, backend="light")
    with pytest.raises(UserError, match="encoder-decoder"), opened:
        pass


def test_which_vllm_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_vllm() is None
    with (
        pytest.raises(UserError, match="no vllm on PATH"),
        serving(model, name="m", port=free_port(), logs=tmp_path, backend="vllm"),
    ):
        pass
    with pytest.raises(UserError, match="cannot be run"):
        find_vllm(tmp_path / "bin" / "vllm")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "vllm"
    command.write_text("#!/bin/sh\nexit 7\n")
    command.chmod(0o755)
    assert find_vllm() == find_vllm(command) == Vllm(command, "", False)
    # Its environment tells the version, and with it the build.
    packages = tmp_path / "packages" / "vllm-0.32.0+cpu.dist-info"
    packages.mkdir(parents=True)
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nshift\ncd {packages.parent}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert find_vllm() == Vllm(command, "0.32.0+cpu", True)
    # Found on PATH it is taken, and its end is told.
    with (
        pytest.raises(RunError, match=r"vLLM 0.32.0\+cpu for CPUs for .* ended"),
        serving(model, name="m", port=free_port(), logs=tmp_path / "logs"),
    ):
        pass


def test_the_command_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 20}))
    plain = vllm_command(
        Vllm(Path("/v/vllm"), "0.32.0", False), Checkpoint("/m"), name="n", port=81, max_batch=7, parser=None
    )
    assert plain[:7] == ["/v/vllm", "serve", "/m", "--host", "127.0.0.1", "--port", "81"]
    assert plain[-2:] == ["--served-model-name", "n"] and not {"--dtype", "--enable-lora"} & {*plain}
    cpu = Vllm(Path("/v/vllm"), "0.32.0", True)
    adapted = vllm_command(cpu, Checkpoint("org/m", tmp_path), name="n", port=81, max_batch=7, parser="hermes")
    text = " ".join(adapted)
    assert "serve org/m --host 127.0.0.1" in text and "--max-num-seqs 7" in text and "--dtype float32" in text
    assert "--enable-auto-tool-choice --tool-call-parser hermes" in text
    assert f"--enable-lora --max-lora-rank 32 --lora-modules n={tmp_path} --served-model-name n-base" in text
    assert "--tokenizer" not in text
    (tmp_path / "tokenizer_config.json").write_text("{}")
    own = vllm_command(cpu, Checkpoint("org/m", tmp_path), name="n", port=81, max_batch=7, parser=None)
    assert f"--tokenizer {tmp_path}" in " ".join(own)


def test_the_environment_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    gpu, cpu = (Vllm(Path("/v/vllm"), "0.32.0", build) for build in (False, True))
    assert not {"PYTHONPATH", "VLLM_CPU_KVCACHE_SPACE"} & vllm_environment(gpu).keys()
    assert vllm_environment(cpu)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert vllm_environment(cpu)["VLLM_CPU_KVCACHE_SPACE"] == "1"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_verb_serves_until_it_is_stopped(model: Path, tmp_path: Path, sent: signal.Signals) -> None:
    port = free_port()
    command = [sys.executable, "-m", "gymtrl", "serve", str(model), "--port", str(port), "-o", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--backend", "light"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == f"serving chain at http://127.0.0.1:{port}/v1 with the light endpoint; Ctrl-C stops it\n"
        assert ask(f"http://127.0.0.1:{port}/v1", model="chain")["content"] == "w1 w2 w3"
        process.send_signal(sent)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert not answers(port)


@pytest.mark.long
def test_vllm_answers_as_the_light_endpoint_does(smollm2_tools_dir: Path, tmp_path: Path) -> None:
    if not VLLM.exists():
        pytest.skip(f"{VLLM} is not there: make check-vllm")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2_tools_dir, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    fields = {"max_tokens": 24, "tools": TOOLS, "logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}
    found: dict[str, Any] = {}
    for backend in ("light", "vllm"):
        with serving(
            tmp_path / "adapter", name="m", port=free_port(), logs=tmp_path / backend, backend=backend, vllm=VLLM
        ) as endpoint:
            assert endpoint.server.startswith("vLLM" if backend == "vllm" else "the light")
            endpoint.check()
            found[backend] = choice(endpoint.url, "Name three colours.", model="m", **fields)
            chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
            tokens = httpx.post(f"{endpoint.url.removesuffix('/v1')}/tokenize", json=chat, timeout=60).json()["tokens"]
            found[f"{backend} prompt"] = tokens
            if backend == "vllm":
                found["base"] = choice(endpoint.url, "Name three colours.", model="m-base", **fields)
    assert found["light"]["message"]["content"] == found["vllm"]["message"]["content"]
    assert found["light prompt"] == found["vllm prompt"]
    ours, theirs, base_ids = (found[name]["logprobs"]["content"] for name in ("light", "vllm", "base"))
    assert [entry["token"] for entry in ours] == [entry["token"] for entry in theirs]
    assert [entry["token"] for entry in ours] != [entry["token"] for entry in base_ids]
