"""From rollouts to token ids and labels on disk: `format sft` against plain scripts and TRL (`format_baselines.py`).

Run as: python benchmarks/format.py SITE_PACKAGES [--work FOLDER] [--out benchmarks/results/format.json]

SITE_PACKAGES is the folder below which nemo-gym is installed. The corpus is made of the rollouts that it ships, as
`corpus.py` repeats them: sound ones with one user message and no reasoning, developer message or image, of at most
8,192 tokens, so that every side trains the same turns. The tokenizer is that of SmolLM2, with TRL's Qwen2.5 chat
template, which knows tools.

Every side begins with its file and ends with Parquet that holds the ids:
    ours          `format_sft` of the rollout file: reads, renders, masks, checks every row, writes the whole folder
    ours_engine   rollouts that have been read already to ids and labels, checks included; nothing is written
    trl           `SFTTrainer`'s own preparation of the same messages, with `assistant_only_loss`; nothing is trained
    naive         `datasets.map` over the same messages, which renders and tokenizes the text before and up to each turn
    bare          the same texts, rendered beforehand, through the tokenizer in batches: no mask, no check, the floor

`phases` says where `ours` spends its CPU time. It comes from samples taken every few milliseconds in a run of its own,
whose time does not count. `agreement` compares ids and labels of the sides: a label that only a baseline trains has to
be the line break that the template puts around an assistant's turn, and ids may differ only where the text is the same
or where `datasets` has rounded a number. Anything else fails the run.

`memory` is the peak of `format_sft` on short rows: the larger file should take no more than the smaller.

Each measurement runs in a process of its own, in turn, on one core (TOKENIZERS_PARALLELISM and OMP_NUM_THREADS are the
same for all). Of several rounds the fastest counts; all are kept. `work_s`, which the ratios and rates mean, leaves out
the start of Python, the imports, and loading the tokenizer, which only `ours` has to do within, being the whole stage;
`wall_s` holds it all. `peak_rss_mb` is the process's highest (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from corpus import corpus_lines, source_digest, source_lines
from format_baselines import bare, naive, ours, ours_engine, trl
from read import compiled, machine, rounded
from read_sides import Result, cpu_seconds, peak_mb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gymtrl.rollouts.record import Rollout

LONGEST, SHORT = 8192, 256  # tokens
SIDES = ("ours", "ours_engine", "trl", "naive", "bare")
BASELINES = {"trl": trl, "naive": naive, "bare": bare}
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
PACKAGES = ("tokenizers", "transformers", "datasets", "pyarrow", "trl", "jinja2")
SAMPLE_SECONDS = 0.004
# The first that a stack holds, by file and, where one is named, function, is what the process was doing.
PHASES = (
    ("checks", "formats/checks.py", ""),
    ("reading", "gymtrl/rollouts/", ""),
    ("writing", "formats/dataset.py", ""),
    ("writing", "formats/folder.py", ""),
    ("writing", "formats/sft.py", "messages"),
    ("encoding", "formats/templates.py", "encode"),
    ("rendering", "chat_template_utils.py", ""),
    ("rendering", "formats/templates.py", "render"),
    ("encoding", "formats/spans.py", ""),
    ("other_of_engine", "formats/masks.py", ""),
    ("other_of_engine", "formats/rows.py", ""),
    ("setting_up", "formats/templates.py", "model_template"),
    ("setting_up", "models/fingerprint.py", ""),
    ("hashing", "workspace/artefact.py", "sha256_of"),
)


def measure_here(name: str, model: str, folder: Path, source: Path) -> Result:
    """Runs one side in this process and times what follows its imports."""
    kind, out = name.partition(":")[0], output_of(name, folder)
    write: Callable[[], None] | None = None
    if kind in BASELINES:
        job = BASELINES[kind](model, source, out)
    elif kind == "ours_engine":
        job, write = ours_engine(model, source, out)
    else:
        job = ours(model, source, out)
    samples: Counter[str] = Counter()
    cpu, start = cpu_seconds(), time.perf_counter()
    if name == "ours:phases":
        with sampled(samples):
            job()
    else:
        job()
    work, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    result: Result = {"work_s": work, "work_cpu_s": cpu, "peak_rss_mb": peak_mb(os.getpid())}
    if write is not None:
        write()
    if samples:
        result["phases"] = {phase: count / samples.total() for phase, count in samples.most_common()}
    return result


@contextmanager
def sampled(samples: Counter[str]) -> Iterator[None]:
    """Counts, for every few milliseconds of CPU time, what the process was doing."""

    def take(number: int, frame: Any) -> None:
        stack = set()
        while frame is not None:
            stack.add((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        samples[phase_of(stack)] += 1

    signal.signal(signal.SIGPROF, take)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def phase_of(stack: set[tuple[str, str]]) -> str:
    """The phase of a stack of (file, function)."""
    for phase, file, function in PHASES:
        if any(file in path and function in ("", name) for path, name in stack):
            return phase
    return "other"


def output_of(name: str, folder: Path) -> Path:
    """Where a side leaves its rows: a dataset folder for ours, else a file."""
    kind = name.partition(":")[0]
    return folder / ("ours" if kind == "ours" else f"{kind}.parquet")


def measure(name: str, model: str, folder: Path, source: Path) -> Result:
    """Runs one side in a fresh process, without anything that an earlier run has cached."""
    cache = folder / "hf"
    for old in (cache, output_of(name, folder)):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, __file__, "--measure", name, model, str(folder), str(source)]
    environment = compiled() | ENVIRONMENT | {"HF_DATASETS_CACHE": str(cache)}
    start = time.perf_counter()
    with (folder / f"log-{name.replace(':', '-')}.txt").open("wb") as log:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=environment)
    wall = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"{name} ended with status {child.returncode}; its output is in {log.name}")
    result: Result = json.loads(child.stdout.splitlines()[-1])
    seconds = f"{wall:>8.2f} s, {result['work_s']:.2f} after imports ({result['work_cpu_s']:.2f} CPU s)"
    print(f"{name:<15}{seconds}, {result['peak_rss_mb']:>6.0f} MB", flush=True)
    return {"wall_s": wall} | result


def fits(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> int | None:
    """Tokens of a rollout that every side can take; `None` where it is not one."""
    messages = (*rollout.prompt, *rollout.completion)
    asked = sum(message.role == "user" for message in messages)
    odd = any(m.reasoning_content or m.images or m.role == "developer" for m in messages)
    if asked != 1 or odd or rollout.truncated or rollout.recorded:
        return None
    count = len(tokenizer(text_of(tokenizer, rollout), add_special_tokens=False, verbose=False)["input_ids"])
    return count if count <= LONGEST else None


def text_of(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """The rendered conversation."""
    from gymtrl.formats.chats import to_chat

    chat = to_chat((*rollout.prompt, *rollout.completion))
    return str(tokenizer.apply_chat_template(chat, tools=list(rollout.tools) or None, tokenize=False))


def build(site_packages: Path, model: str, folder: Path, rows: int, flat_rows: list[int]) -> Result:
    """Writes the corpora, the same for the same arguments: `rollouts.jsonl`, and from it `chats.jsonl` and
    `texts.jsonl` for the baselines; and of the short conversations `flat-N.jsonl`."""
    from gymtrl.formats.chats import to_chat
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.rollouts.reader import read_lines

    tokenizer = load_tokenizer(model)
    sources = source_lines(site_packages)
    candidates = folder / "candidates.jsonl"
    candidates.write_bytes(b"".join(line + b"\n" for line in sources))
    lengths = {
        line.origin.line: fits(tokenizer, line.rollout)
        for line in read_lines([candidates])
        if line.verdict == "ok" and line.rollout is not None
    }
    # `Origin.line` counts from 1. The markers of a repetition lengthen a row a little.
    chosen = [sources[n - 1] for n, length in lengths.items() if length is not None and length < LONGEST - 64]
    short = [sources[n - 1] for n, length in lengths.items() if length is not None and length <= SHORT]
    candidates.unlink()
    repeat(chosen, folder / "rollouts.jsonl", rows)
    for count in flat_rows:
        repeat(short, folder / f"flat-{count}.jsonl", count)
    with (folder / "chats.jsonl").open("w") as chats, (folder / "texts.jsonl").open("w") as texts:
        for line in read_lines([folder / "rollouts.jsonl"]):
            rollout = line.rollout
            assert rollout is not None, line.detail
            parts = {"prompt": to_chat(rollout.prompt), "completion": to_chat(rollout.completion)}
            chats.write(json.dumps({**parts, "tools": list(rollout.tools)}) + "\n")
            texts.write(json.dumps(text_of(tokenizer, rollout)) + "\n")
    size = (folder / "rollouts.jsonl").stat().st_size
    return {"sha256": source_digest(sources), "distinct": len(chosen), "rows": rows, "bytes": size}


def repeat(sources: list[bytes], out: Path, rows: int) -> None:
    """Writes so many lines, each repetition of a source line told apart as in `corpus.py`."""
    with out.open("wb") as target:
        target.writelines(line + b"\n" for line in islice(corpus_lines(sources), rows))


def rows_of_side(name: str, folder: Path) -> Iterator[tuple[list[int], list[int] | None]]:
    """Ids and labels of a side, row by row in the order of the file."""
    out = output_of(name, folder)
    paths = sorted((out / "data").glob("train-*.parquet")) if out.is_dir() else [out]
    for path in paths:
        with pq.ParquetFile(path) as file:
            columns = [name for name in ("input_ids", "labels") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    yield row["input_ids"], row.get("labels")


def agreement(tokenizer: PreTrainedTokenizerBase, folder: Path, side: str) -> Result:
    """Compares a side with ours, row by row; `unexplained` counts the rows that should not differ as they do."""
    found: Counter[str] = Counter(unexplained=0)
    pairs = zip(rows_of_side("ours", folder), rows_of_side(side, folder), strict=True)
    for (ids, labels), (their_ids, their_labels) in pairs:
        found["rows"] += 1
        found["same_ids"] += ids == their_ids
        assert labels is not None
        if ids != their_ids:
            same_text = tokenizer.decode(ids) == tokenizer.decode(their_ids)
            found["other_ids_same_text" if same_text else "other_text"] += 1
            found["unexplained"] += not same_text and not rounded_numbers(tokenizer, ids, their_ids)
        elif their_labels is not None:
            differing = Counter(where_differs(tokenizer, ids, labels, their_labels))
            found["same_loss_tokens"] += not differing
            found["unexplained"] += "other" in differing
            found.update({f"loss_on_{what}": count for what, count in differing.items()})
    return dict(found)


def where_differs(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int], theirs: list[int]
) -> Iterator[str]:
    """Names every position that only one side trains."""
    for i, (our, their) in enumerate(zip(labels, theirs, strict=True)):
        if our == their:
            continue
        line_break = our == -100 and tokenizer.decode([ids[i]]) == "\n"
        if line_break and i and labels[i - 1] != -100:
            yield "line_break_after_turn"
        elif line_break and i + 1 < len(labels) and labels[i + 1] != -100:
            yield "line_break_before_turn"
        else:
            yield "other"


def rounded_numbers(tokenizer: PreTrainedTokenizerBase, ids: list[int], theirs: list[int]) -> bool:
    """Whether the texts differ in digits alone: `datasets` rounds the floats of a `Json()` column."""
    without = str.maketrans("", "", "0123456789")
    ours, other = (str(tokenizer.decode(row)).translate(without) for row in (ids, theirs))
    return ours == other


def compared(results: dict[str, Result], tokens: int, rows: int) -> dict[str, Result]:
    """Rates of every side, and how many times as fast as each baseline ours are."""
    found: dict[str, Result] = {}
    for name, result in results.items():
        rates = {"rows_per_s": rows / result["work_s"], "tokens_per_s": tokens / result["work_s"]}
        ratios = {f"times_as_fast_as_{base}": results[base]["work_s"] / result["work_s"] for base in BASELINES}
        found[name] = rates | ratios
    return found


def benchmark(model: str, folder: Path, corpus: Result, *, rounds: int) -> Result:
    """All sides on the corpus."""
    from gymtrl.models.fingerprint import load_tokenizer

    sources = {"ours": "rollouts", "ours_engine": "rollouts", "bare": "texts"}
    runs: dict[str, list[Result]] = {name: [] for name in SIDES}
    for _ in range(rounds):
        for name in SIDES:
            source = folder / f"{sources.get(name, 'chats')}.jsonl"
            runs[name].append(measure(name, model, folder, source))
    phases = measure("ours:phases", model, folder, folder / "rollouts.jsonl")["phases"]
    best = {name: min(results, key=lambda result: result["work_s"]) for name, results in runs.items()}
    for name, results in runs.items():
        best[name]["work_s_of_rounds"] = [result["work_s"] for result in results]
    tokenizer = load_tokenizer(model)
    made = [(len(ids), sum(label != -100 for label in labels or ())) for ids, labels in rows_of_side("ours", folder)]
    if len(made) != corpus["rows"]:
        raise SystemExit(f"ours wrote {len(made)} of {corpus['rows']} rows")
    tokens, loss_tokens = map(sum, zip(*made, strict=True))
    rates = compared(best, tokens, corpus["rows"])
    for name, rate in rates.items():
        print(f"{name:<15}{rate['rows_per_s']:>8.0f} rows/s {rate['tokens_per_s']:>10.0f} tokens/s  "
              + ", ".join(f"{rate[f'times_as_fast_as_{base}']:.2f} x {base}" for base in BASELINES))  # fmt: skip
    print("phases of ours: " + ", ".join(f"{phase} {share:.0%}" for phase, share in phases.items()))
    return {
        "corpus": corpus | {"tokens": tokens, "loss_tokens": loss_tokens},
        "rounds": rounds,
        "sides": best,
        "compared": rates,
        "phases": phases,
        "agreement": {side: agreement(tokenizer, folder, side) for side in SIDES if side != "ours"},
    }


def memory(model: str, folder: Path, flat_rows: list[int]) -> Result:
    """Peak of `format_sft` on each of the flat files, and that of the last as a multiple of the first."""
    found = {str(count): measure("ours", model, folder, folder / f"flat-{count}.jsonl") for count in flat_rows}
    peaks = [result["peak_rss_mb"] for result in found.values()]
    print(f"peak of the largest is {peaks[-1] / peaks[0]:.2f} times that of the smallest", flush=True)
    return {"rows": found, "last_to_first": peaks[-1] / peaks[0]}


def model_folder() -> str:
    """The model whose tokenizer is used, made where it is missing."""
    from gymtrl.home import gymtrl_home
    from gymtrl.models.smollm2 import make_smollm2

    folder = gymtrl_home() / "models" / "SmolLM2-135M-Instruct-tools"
    return str(folder if folder.exists() else make_smollm2(folder, template="qwen2.5"))


def main() -> None:
    """Measures, prints the figures and writes them."""
    if sys.argv[1:2] == ["--measure"]:
        name, model, folder, source = sys.argv[2:]
        print("\n" + json.dumps(measure_here(name, model, Path(folder), Path(source))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site_packages", type=Path, help="folder below which nemo-gym is installed")
    parser.add_argument("--rows", type=int, default=1000, help="conversations (default: 1000)")
    parser.add_argument("--flat", type=int, nargs="+", default=[10_000, 200_000], help="default: 10000 200000")
    parser.add_argument("--quick", action="store_true", help="few rows and one round, to try it; written with --out")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gymtrl-benchmark-format")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/format.json")
    options = parser.parse_args()
    rows, flat, rounds = (24, [50, 100], 1) if options.quick else (options.rows, sorted(options.flat), 3)
    out = options.out or (None if options.quick else Path(__file__).parent / "results" / "format.json")
    os.environ |= ENVIRONMENT
    folder, model = options.work.resolve(), model_folder()
    folder.mkdir(parents=True, exist_ok=True)
    result: Result = {
        "machine": machine() | {"packages": {package: version(package) for package in PACKAGES}},
        "load_before": os.getloadavg()[0],
        "environment": ENVIRONMENT,
    }
    corpus = build(options.site_packages, model, folder, rows, flat)
    result |= benchmark(model, folder, corpus, rounds=rounds)
    result["memory"] = memory(model, folder, flat)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    for side, facts in result["agreement"].items():
        print(f"{side} against ours: " + ", ".join(f"{count} {fact}" for fact, count in facts.items()))
    shutil.rmtree(folder)
    if any(facts["unexplained"] for facts in result["agreement"].values()):
        sys.exit("a side differs from ours in a way that is not explained")


if __name__ == "__main__":
    main()
