"""Reading rollout files: gymtrl against a plain script (`read_baseline.py`), on a corpus made of shipped rollouts.

Run as: python benchmarks/read.py SITE_PACKAGES [--sizes 0.6e9 6e9] [--work FOLDER] [--out benchmarks/results/read.json]

SITE_PACKAGES is the folder below which nemo-gym is installed; `corpus.py` tells what is made of its files. Linux only.

`table`, the rollout table as Parquet, from the file:
    ours_1, ours_2    `write_table` with one worker and with two
    baseline          `baseline_table(...).write_parquet`: one process, `json.loads`; same verdicts, columns and rows
`selected`, the prompt and completion messages of about a tenth of the rows, as JSONL, without tokens:
    ours              starts with the table of `ours_1`, whose time is not in it: `filter_rollouts` with the settings
                      of `SELECTED`, which writes its whole folder, then `read_lines` of the kept lines and `to_chat`
    baseline          has kept no table: makes it, chooses the same rows with polars, reads the file again line by
                      line, and decodes and converts the lines it has chosen; its `phases` tell the parts, so that the
                      time without the table can be seen as well
`orientation`, on the smallest size only; none of them does the job, so no ratio is given:
    json, orjson, msgspec, simdjson    every line is decoded and forgotten (simdjson's documents are lazy)
    datasets          `load_dataset("json")`, then `map` to the reward and the text of the last output item
    polars, duckdb    the mean reward and the characters of the response, with the types of three columns given
    ..._clean         the same on a file of the rollouts alone, without malformed lines and other rows

`commands`, what a user waits for: `gymtrl --version`, `gymtrl inspect --help`, and `gymtrl inspect` of 100 MB.

Each runs in a process of its own, in turn, on a file that has just been read, so that the disk plays no part. Of
several rounds the fastest counts, as other work on the machine only ever slows a round down; all are kept. `wall_s` and
`cpu_s` are those of the whole process, from its start to its end, and what ratios mean; `work_s` and `work_cpu_s` leave
out the start of Python and the imports, which weigh on small files only. CPU seconds include workers and threads. The
peak of memory (VmHWM) is summed over the process and its workers, each at its own peak, which counts pages that they
share more than once. What fails is a result, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from corpus import build_corpus, source_digest, source_lines
from read_sides import FILTERED, LOADERS, PARSERS, SELECTED, Result, clean, cpu_seconds, facts, measure_here, peak_mb

QUICK = 30e6
SIDES = {"table": ("ours_1", "ours_2", "baseline"), "selected": ("ours", "baseline")}
ORIENTATION = (*PARSERS, *LOADERS, *(f"{name}_clean" for name in LOADERS))
PACKAGES = ("polars", "msgspec", "orjson", "pysimdjson", "datasets", "duckdb")


def measure(name: str, corpus: Path, folder: Path) -> Result:
    """Runs one of them in a fresh process and watches the memory of its workers."""
    import psutil

    if name.endswith("_clean"):
        corpus = clean(corpus, folder)
    shutil.rmtree(folder / FILTERED, ignore_errors=True)
    command = [sys.executable, __file__, "--measure", name, str(corpus), str(folder)]
    peaks: dict[int, float] = {}
    with (folder / "result.json").open("wb") as answer, (folder / "log.txt").open("wb") as log:
        cpu, start = cpu_seconds(children_only=True), time.perf_counter()
        child = subprocess.Popen(command, stdout=answer, stderr=log, env=compiled())
        ended = os.pidfd_open(child.pid)
        while not select.select([ended], [], [], 0.2)[0]:
            try:
                workers = psutil.Process(child.pid).children(recursive=True)
            except psutil.Error:
                continue
            peaks |= {worker.pid: max(peak_mb(worker.pid), peaks.get(worker.pid, 0.0)) for worker in workers}
        wall = time.perf_counter() - start
        code = child.wait()
        cpu = cpu_seconds(children_only=True) - cpu
        os.close(ended)
    lines = (folder / "result.json").read_text().splitlines()
    if code or not lines:
        return {"failed": f"ended with status {code}"}
    result: Result = json.loads(lines[-1])
    if "failed" in result:
        return result
    if peaks:
        result["peak_rss_mb"] += sum(peaks.values())
        result["child_processes"] = len(peaks)
    speed = corpus.stat().st_size / 1e6 / wall
    return {"wall_s": wall, "cpu_s": cpu, "mb_per_s": speed} | result | facts(name, folder)


def compiled() -> dict[str, str]:
    """An environment in which Python keeps what it has compiled, as it does for packages that pip has installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def rounds_of(group: str, names: tuple[str, ...], count: int, corpus: Path, folder: Path) -> dict[str, Result]:
    """Every side `count` times, in turn; of each the fastest round, with the seconds of all."""
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            runs[name].append(measure(f"{group}:{name}", corpus, folder))
            print(row_text(group, name, runs[name][-1]), flush=True)
    best = {name: min(results, key=lambda result: result.get("wall_s", 0.0)) for name, results in runs.items()}
    return {
        name: result if "failed" in result else result | {"wall_s_of_rounds": [run["wall_s"] for run in runs[name]]}
        for name, result in best.items()
    }


def compared(results: dict[str, Result]) -> dict[str, Result]:
    """Ours against the baseline: seconds of the baseline for each of ours, and our share of its CPU time and memory."""
    theirs = results["baseline"]
    found = {}
    for name, ours in results.items():
        if name != "baseline" and "failed" not in ours and "failed" not in theirs:
            found[name] = {
                "times_as_fast": theirs["wall_s"] / ours["wall_s"],
                "times_as_fast_after_imports": theirs["work_s"] / ours["work_s"],
                "cpu_share": ours["cpu_s"] / theirs["cpu_s"],
                "cpu_share_after_imports": ours["work_cpu_s"] / theirs["work_cpu_s"],
                "memory_share": ours["peak_rss_mb"] / theirs["peak_rss_mb"],
                "same_result": all(
                    ours.get(fact) == theirs.get(fact) for fact in ("rows", "verdicts", "distinct", "content")
                ),
            }
    return found


def benchmark(corpus: Path, folder: Path, *, rounds: int, orientation: bool) -> Result:
    """All measurements on one corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in _chunks(corpus):
        pass
    result: Result = {"bytes": corpus.stat().st_size}
    for group, names in SIDES.items():
        sides = rounds_of(group, names, rounds, corpus, folder)
        result[group] = {"sides": sides, "compared": compared(sides)}
        for name, ratio in result[group]["compared"].items():
            print(f"{group}: {name} is {ratio['times_as_fast']:.2f} times as fast as the baseline "
                  f"({ratio['times_as_fast_after_imports']:.2f} after imports), with {ratio['cpu_share']:.0%} of its "
                  f"CPU time ({ratio['cpu_share_after_imports']:.0%}) and {ratio['memory_share']:.0%} of its memory; "
                  f"same result: {'yes' if ratio['same_result'] else 'NO'}")  # fmt: skip
    if orientation:
        result["orientation"] = rounds_of("orientation", ORIENTATION, 1, corpus, folder)
    shutil.rmtree(folder)
    return result


def commands(corpus: Path) -> dict[str, Result]:
    """Seconds of the command line, the fastest of three runs."""
    gymtrl = [sys.executable, "-m", "gymtrl"]
    asked = {"version": ["--version"], "inspect_help": ["inspect", "--help"]}
    asked[f"inspect_{corpus.stat().st_size / 1e6:.0f}_mb"] = ["inspect", str(corpus), "--json"]
    found: dict[str, Result] = {}
    for name, arguments in asked.items():
        runs = []
        for _ in range(3):
            cpu, start = cpu_seconds(children_only=True), time.perf_counter()
            subprocess.run([*gymtrl, *arguments], check=True, stdout=subprocess.DEVNULL, env=compiled())
            wall = time.perf_counter() - start
            runs.append({"wall_s": wall, "cpu_s": cpu_seconds(children_only=True) - cpu})
        found[name] = min(runs, key=lambda run: run["cpu_s"])
        print(
            f"{'commands':<12}{name:<15}{found[name]['wall_s']:>8.2f} s {found[name]['cpu_s']:>8.2f} CPU s", flush=True
        )
    return found


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            yield chunk


def row_text(group: str, name: str, result: Result) -> str:
    """One line of the printed table."""
    from gymtrl.text import plain

    if "failed" in result:
        return f"{group:<12}{name:<15}failed: {plain(result['failed'])}"
    return (
        f"{group:<12}{name:<15}{result['wall_s']:>8.2f} s ({result['work_s']:.2f} after imports) "
        f"{result['cpu_s']:>8.2f} CPU s {result['mb_per_s']:>7.1f} MB/s "
        f"{result['peak_rss_mb']:>7.0f} MB {result['rows']:>9} rows"
    )


def machine() -> Result:
    """Processor, cores, memory and versions; nothing that names the machine."""
    names = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "cpu": names[1] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "packages": packages,
    }


def rounded(value: Any) -> Any:
    """Figures as they are written: three decimals."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Measures every size, prints the figures and writes them."""
    if sys.argv[1:2] == ["--measure"]:
        print("\n" + json.dumps(measure_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site_packages", type=Path, help="folder below which nemo-gym is installed")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.6e9, 6e9], help="bytes (default: 0.6e9 6e9)")
    parser.add_argument("--quick", action="store_true", help="30 MB and one round, to try it out; written with --out")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gymtrl-benchmark-read")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/read.json")
    options = parser.parse_args()
    sizes = [QUICK] if options.quick else sorted(options.sizes)
    out = options.out or (None if options.quick else Path(__file__).parent / "results" / "read.json")
    sources = source_lines(options.site_packages)
    made_of = {"lines": len(sources), "bytes": sum(map(len, sources)), "sha256": source_digest(sources)}
    result: Result = {"machine": machine(), "load_before": os.getloadavg()[0], "sources": made_of}
    result |= {"selected_with": SELECTED, "sizes": []}

    def made(size: float) -> Path:
        path: Path = options.work.resolve() / f"rollouts-{made_of['sha256']}-{size / 1e6:.0f}MB.jsonl"
        if not path.exists():
            build_corpus(options.site_packages, path, size)
        return path

    result["commands"] = commands(made(QUICK if options.quick else 100e6))
    for size in sizes:
        corpus = made(size)
        rounds = 1 if options.quick or size > 2e9 else 3
        print(f"{corpus.name}, {rounds} round{'s' * (rounds > 1)}", flush=True)
        parts = benchmark(corpus, corpus.with_suffix(""), rounds=rounds, orientation=size == sizes[0])
        result["sizes"].append(parts | {"rounds": rounds})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(f"the corpora stay in {options.work}", flush=True)
    groups = [size[group]["compared"].values() for size in result["sizes"] for group in SIDES]
    if not all(ratio["same_result"] for group in groups for ratio in group):
        sys.exit("the two sides differ in their results")


if __name__ == "__main__":
    main()
