"""What `read.py` measures. Each function imports what it needs, prepares, and returns the part that is timed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Job = Callable[[], Result]

# Three eighths of the good rows: a tenth of all, once the corpus holds whole tasks (eight times the shipped files).
SELECTED: Result = {"reward_threshold": 1.0, "cap_per_task": 3, "validation": 0.0, "seed": 0}
FILTERED = "filtered"
KEYS = ("task_key", "input_key", "cluster_key", "completion_key", "group")
PARSERS, LOADERS = ("json", "orjson", "msgspec", "simdjson"), ("datasets", "polars", "duckdb")


def table_ours(corpus: Path, folder: Path, workers: int) -> Job:
    from gymtrl.rollouts.scan import write_table

    def job() -> Result:
        write_table([corpus], folder / f"ours_{workers}.parquet", workers=workers)
        return {}

    return job


def table_baseline(corpus: Path, folder: Path) -> Job:
    from read_baseline import baseline_table

    def job() -> Result:
        baseline_table([corpus]).write_parquet(folder / "baseline.parquet")
        return {}

    return job


def selected_ours(corpus: Path, folder: Path) -> Job:
    import msgspec

    from gymtrl.formats.chats import to_chat
    from gymtrl.rollouts.reader import read_lines
    from gymtrl.selection.filter import filter_rollouts
    from gymtrl.selection.settings import FilterSettings

    out = folder / FILTERED

    def job() -> Result:
        start = time.perf_counter()
        filter_rollouts([folder / "ours_1.parquet"], out, FilterSettings(**SELECTED))
        chosen = time.perf_counter()
        rows = 0
        encode = msgspec.json.Encoder().encode
        with (folder / "selected-ours.jsonl").open("wb") as target:
            for line in read_lines([out / "train.jsonl"]):
                if line.rollout is not None:
                    chat = {"prompt": to_chat(line.rollout.prompt), "completion": to_chat(line.rollout.completion)}
                    target.write(encode(chat) + b"\n")
                    rows += 1
        return {"rows": rows, "phases": {"filter": chosen - start, "convert": time.perf_counter() - chosen}}

    return job


def selected_baseline(corpus: Path, folder: Path) -> Job:
    from read_baseline import baseline_table, chat_message, decode, read_chat

    def job() -> Result:
        start = time.perf_counter()
        table = baseline_table([corpus])
        tabled = time.perf_counter()
        chosen = set(choose(table))
        decided = time.perf_counter()
        with corpus.open("rb") as source, (folder / "selected-baseline.jsonl").open("w") as target:
            for number, line in enumerate(source, 1):
                if number in chosen:
                    chat = read_chat(decode(line))
                    row = {side: [chat_message(m) for m in chat[side]] for side in ("prompt", "completion")}
                    target.write(json.dumps(row) + "\n")
        end = time.perf_counter()
        phases = {"table": tabled - start, "choose": decided - tabled, "convert": end - decided}
        return {"rows": len(chosen), "phases": phases}

    return job


def choose(table: Any) -> list[int]:
    """Numbers of the lines that `filter` keeps with the settings of `SELECTED`."""
    import polars as pl

    draws = [hashlib.sha256(f"{SELECTED['seed']}:{row_id}".encode()).hexdigest() for row_id in table["row_id"]]
    kept = (
        table.with_columns(draw=pl.Series(draws))
        .filter(
            pl.col("verdict") == "ok",
            pl.col("reward").is_finite() & (pl.col("reward") >= SELECTED["reward_threshold"]),
            ~pl.col("masked") & ~pl.col("truncated") & pl.col("fault").is_null(),
        )
        .sort("reward", "draw", "line", descending=[True, False, False])
        .unique(["task_key", "completion_key"], keep="first", maintain_order=True)
        .filter(pl.int_range(pl.len()).over("task_key") < SELECTED["cap_per_task"])
    )
    return list(kept["line"])


def parse_with(name: str, corpus: Path) -> Job:
    import msgspec

    if name == "simdjson":
        parse = import_module("simdjson").Parser().parse
    elif name == "msgspec":
        parse = msgspec.json.Decoder().decode
    else:
        parse = import_module(name).loads

    def job() -> Result:
        rows = refused = 0
        with corpus.open("rb") as stream:
            for line in stream:
                rows += 1
                try:
                    parse(line)
                except (ValueError, msgspec.MsgspecError):
                    refused += 1
        return {"rows": rows, "refused": refused}

    return job


def load_with_datasets(corpus: Path, folder: Path) -> Job:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets

    def extract(row: Result) -> Result:
        last = row["response"]["output"][-1:]
        said = last[0].get("content") if last and isinstance(last[0], dict) else None
        parts = said if isinstance(said, list) else [{"text": said}]
        return {"reward": row.get("reward"), "text": "".join(part.get("text") or "" for part in parts)}

    def job() -> Result:
        loaded = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "hf"))
        made = loaded.map(extract, remove_columns=loaded.column_names)
        return {"rows": len(made)}

    return job


def scan_with_polars(corpus: Path) -> Job:
    import polars as pl

    schema = {"reward": pl.Float64, "responses_create_params": pl.String, "response": pl.String}

    def job() -> Result:
        lines = pl.scan_ndjson(corpus, schema=schema, ignore_errors=True)
        made = lines.select(pl.len(), pl.col("reward").mean(), pl.col("response").str.len_chars().sum().alias("chars"))
        rows, reward, chars = made.collect().row(0)
        return {"rows": rows, "mean_reward": reward, "response_chars": chars}

    return job


def read_with_duckdb(corpus: Path) -> Job:
    import duckdb

    query = """SELECT count(*), avg(reward), sum(length(response)) FROM read_json(?, format = 'newline_delimited',
        columns = {reward: 'DOUBLE', responses_create_params: 'JSON', response: 'JSON'}, ignore_errors = true,
        maximum_object_size = 67108864)"""

    def job() -> Result:
        found = duckdb.execute(query, [str(corpus)]).fetchone()
        rows, reward, chars = found or (0, None, None)
        return {"rows": rows, "mean_reward": reward, "response_chars": chars}

    return job


def clean(corpus: Path, folder: Path) -> Path:
    """A file of the rollouts in the corpus alone."""
    path = folder / "clean.jsonl"
    if not path.exists():
        with corpus.open("rb") as source, path.open("wb") as target:
            target.writelines(line for line in source if _is_rollout(line))
    return path


def _is_rollout(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and all(isinstance(row.get(k), dict) for k in ("responses_create_params", "response"))


def prepare(name: str, corpus: Path, folder: Path) -> Job:
    """The job of a name, and what it needs beforehand."""
    group, _, side = name.partition(":")
    if group == "table":
        return table_baseline(corpus, folder) if side == "baseline" else table_ours(corpus, folder, int(side[-1]))
    if group == "selected":
        return selected_baseline(corpus, folder) if side == "baseline" else selected_ours(corpus, folder)
    if side in PARSERS:
        return parse_with(side, corpus)
    if side.startswith("datasets"):
        return load_with_datasets(corpus, folder)
    return scan_with_polars(corpus) if side.startswith("polars") else read_with_duckdb(corpus)


def measure_here(name: str, corpus: Path, folder: Path) -> Result:
    """Runs one of them in this process and times what follows its imports; what fails is the result."""
    try:
        job = prepare(name, corpus, folder)
        cpu, start = cpu_seconds(), time.perf_counter()
        made = job()
        wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    except Exception as error:
        cause = error.__cause__ or error
        return {"failed": f"{type(cause).__name__}: {_harmless(str(cause))}"}
    return {"work_s": wall, "work_cpu_s": cpu, "peak_rss_mb": peak_mb(os.getpid())} | made


def facts(name: str, folder: Path) -> Result:
    """What the result of one of them is compared by; nothing where no result is kept."""
    group, _, side = name.partition(":")
    if group == "table":
        return _table_facts(folder / f"{side}.parquet")
    return _chat_facts(folder / f"selected-{side}.jsonl") if group == "selected" else {}


def _table_facts(path: Path) -> Result:
    """What both tables have to agree in: verdicts, how many keys there are, and every other plain column."""
    import polars as pl

    table = pl.read_parquet(path)
    verdicts = table.group_by("verdict", "reason").len().sort("verdict", "reason").rows()
    plain = [name for name, kind in table.schema.items() if name not in (*KEYS, "detail") and not kind.is_nested()]
    return {
        "rows": len(table),
        "verdicts": {f"{verdict}:{reason}".rstrip(":"): count for verdict, reason, count in verdicts},
        "distinct": {name: table[name].n_unique() for name in KEYS},
        "content": hashlib.sha256(table.select(plain).hash_rows().to_numpy().tobytes()).hexdigest()[:16],
    }


def _chat_facts(path: Path) -> Result:
    content = hashlib.sha256()
    with path.open("rb") as stream:
        for line in stream:
            content.update(json.dumps(json.loads(line), sort_keys=True).encode())
    return {"content": content.hexdigest()[:16]}


def cpu_seconds(*, children_only: bool = False) -> float:
    """CPU time of this process and of its children that have ended, or of these alone."""
    whose = [resource.RUSAGE_CHILDREN] if children_only else [resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN]
    used = map(resource.getrusage, whose)
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mb(pid: int) -> float:
    """Most memory that a process has held; 0 where it is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _harmless(text: str) -> str:
    """The first line of a message, without folders of this machine."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"(?:/[^\s/'\":]+)+/", "", first)[:200]
