"""Rollouts a minute of the light endpoint, against `transformers` generate in left-padded batches; vLLM beside them.

Run as: python benchmarks/serve.py MODEL [--threads 2] [--vllm .venv-vllm/bin/vllm]

The load is that of a group-sampling collection: 64 tasks, 3 rollouts each, prompts that share their first part, sampled
at temperature 1, 64 requests at a time. The servers are asked over HTTP, and started anew for each round, so that no
prefix is known beforehand; `generate` runs in a fresh process too, in which no other thread computes. Starting and
loading is not counted. All get the same prompts. Rounds alternate, and the faster counts for each side, as other work
on the machine only ever slows a round down; vLLM, which takes minutes to start, has one. Ends with status 1 where the
light endpoint does not reach LEAST_TIMES the rollouts a minute of `generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from gymtrl.gym.servers import free_port
from gymtrl.serving.chat import prompt_ids
from gymtrl.serving.launch import serving
from gymtrl.serving.prefixes import common_prefix
from gymtrl.serving.server import load_model
from gymtrl.serving.settings import Backend

TASKS, REPEATS, NEW_TOKENS, CONCURRENT = 64, 3, 24, 64
LEAST_TIMES = 1.8
Chat = list[dict[str, str]]


def chats() -> list[Chat]:
    """One worked turn, the same for all, then a question of the task's own; each task `REPEATS` times."""
    ask = "State the final answer to the following arithmetic problem: {} + {} ="
    # The numbers come first, so that what follows them is the task's own.
    question = "{} + {} = is the arithmetic problem. State the final answer as above, please."
    shown = [
        {"role": "user", "content": ask.format(5, 7)},
        {"role": "assistant", "content": "5 + 7 = 12 <answer>12</answer>"},
    ]
    tasks = [[*shown, {"role": "user", "content": question.format(i % 8 + 1, i // 8 + 1)}] for i in range(TASKS)]
    return [task for task in tasks for _ in range(REPEATS)]


def served_round(
    model: Path, asked: list[Chat], backend: Backend, vllm: Path | None = None
) -> tuple[str, tuple[float, int]]:
    """What served, and the seconds and generated tokens of a round that begins when the server is warm."""
    with (
        tempfile.TemporaryDirectory(prefix="gymtrl-serve-") as logs,
        serving(
            model, name="m", port=free_port(), logs=Path(logs), max_batch=CONCURRENT, backend=backend, vllm=vllm
        ) as endpoint,
        httpx.Client(base_url=endpoint.url, timeout=600, limits=httpx.Limits(max_connections=CONCURRENT)) as client,
        ThreadPoolExecutor(CONCURRENT) as pool,
    ):

        def ask(chat: Chat) -> int:
            body = {"model": "m", "messages": chat, "temperature": 1.0, "top_p": 1.0, "max_tokens": NEW_TOKENS}
            answer = client.post("/chat/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        start = time.perf_counter()
        tokens = sum(pool.map(ask, asked))
        return endpoint.server, (time.perf_counter() - start, tokens)


def generate_round(model: Path, threads: int) -> tuple[float, int]:
    """Seconds and generated tokens of `generated` in a process of its own."""
    command = [sys.executable, __file__, str(model), "--threads", str(threads), "--generate"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, tokens = json.loads(printed.splitlines()[-1])
    return float(seconds), int(tokens)


@torch.inference_mode()
def generated(model: Any, tokenizer: Any, asked: list[tuple[int, ...]]) -> tuple[float, int]:
    """Left-padded batches through `model.generate`: seconds and generated tokens, end of sequence included."""
    start, tokens = time.perf_counter(), 0
    for begin in range(0, len(asked), CONCURRENT):
        batch = asked[begin : begin + CONCURRENT]
        longest = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        output = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS
        )
        for row in output[:, longest:].tolist():
            end = tokenizer.eos_token_id
            tokens += row.index(end) + 1 if end in row else len(row)
    return time.perf_counter() - start, tokens


def figures(rounds: list[tuple[float, int]], count: int) -> dict[str, Any]:
    """The best round's rates, and the seconds of all."""
    seconds, tokens = min(rounds, key=lambda entry: entry[0])
    return {
        "rollouts_per_minute": round(60 * count / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of_rounds": [round(entry[0], 2) for entry in rounds],
        "tokens_of_rounds": [entry[1] for entry in rounds],
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    """Measures all sides, prints the ratio and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each side (default: 2)")
    parser.add_argument("--vllm", type=Path, help="vLLM's command, to be measured beside (default: not measured)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the sides
    # While weights load in threads of their own, none of them may open a pool of OpenMP's beside that of `generate`.
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, device="cpu")
    asked = chats()
    ids = [prompt_ids(tokenizer, chat) for chat in asked]
    if options.generate:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(generated(model, tokenizer, ids)))
        return
    load_before = os.getloadavg()[0]
    ours: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    sides: list[tuple[str, list[tuple[float, int]], Callable[[], tuple[float, int]]]] = [
        ("light endpoint", ours, lambda: served_round(options.model, asked, "light")[1]),
        ("transformers generate", theirs, lambda: generate_round(options.model, options.threads)),
    ]
    for _ in range(options.rounds):
        for name, rounds, measure in sides:
            rounds.append(measure())
            print(f"{name}: {rounds[-1][0]:.1f} s", flush=True)
    rates = {name: figures(rounds, len(asked)) for name, rounds, _ in sides}
    if options.vllm is not None:
        name, measured = served_round(options.model, asked, "vllm", options.vllm)
        rates[name] = figures([measured], len(asked))
    light, plain = rates["light endpoint"], rates["transformers generate"]
    result = {
        "load": {
            "requests": len(asked),
            "tasks": TASKS,
            "concurrent": CONCURRENT,
            "new_tokens_at_most": NEW_TOKENS,
            "prompt_tokens": sorted({len(prompt) for prompt in ids}),
            "shared_prompt_tokens": min(common_prefix(ids[0], prompt) for prompt in ids[REPEATS:]),
            "temperature": 1.0,
        },
        **rates,
        "ratio": round(light["rollouts_per_minute"] / plain["rollouts_per_minute"], 2),
        # Beside it, as the two draw different samples, and so not the same number of tokens.
        "ratio_of_tokens_per_second": round(light["tokens_per_second"] / plain["tokens_per_second"], 2),
        "machine": {
            "cpu": cpu_name(),
            "threads": options.threads,
            "load_average_before_and_after": [round(load_before, 1), round(os.getloadavg()[0], 1)],
            "dtype": str(model.dtype),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, side in rates.items():
        print(f"{name}: {side['rollouts_per_minute']} rollouts/min, {side['tokens_per_second']} tokens/s")
    print(f"ratio of rollouts a minute {result['ratio']} (written to {options.out})")
    if result["ratio"] < LEAST_TIMES:
        sys.exit(f"the light endpoint is not {LEAST_TIMES} times as fast as generate")


if __name__ == "__main__":
    main()
