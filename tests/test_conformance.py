"""What the reader says about the rollout files that NeMo Gym ships."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.record import Line

EXPECTED = Path(__file__).parent / "data" / "expected-verdicts-nemo-gym-0.4.0.json"
OTHER_FILES = "GYMTRL_GYM_FILES"


def told(line: Line) -> str:
    return f"{line.verdict}:{line.reason}" if line.reason else line.verdict


def expected_verdicts() -> dict[str, list[str]]:
    """The verdict of each line that is not blank, by file; stored as runs such as `3 ok, 2 context:hidden_context`."""
    runs = {
        file: [run.split(" ") for run in text.split(", ")] for file, text in json.loads(EXPECTED.read_text()).items()
    }
    return {file: [verdict for count, verdict in found for _ in range(int(count))] for file, found in runs.items()}


def test_every_line_that_gym_ships_has_the_expected_verdict(gym_site_packages: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    lines: dict[str, list[Line]] = {str(path.relative_to(gym_site_packages)): [] for path in files}
    for line in read_lines(files):
        lines[str(Path(line.origin.file).relative_to(gym_site_packages))].append(line)
    expected = expected_verdicts()
    differences = [
        f"{file}:{line.origin.line} is {told(line)} ({line.detail}), expected {verdict}"
        for file in lines.keys() & expected.keys()
        for line, verdict in zip(lines[file], expected[file], strict=False)
        if told(line) != verdict
    ]
    differences += [
        f"{file} has {len(lines.get(file, []))} lines, expected {len(expected.get(file, []))}"
        for file in lines.keys() | expected.keys()
        if len(lines.get(file, [])) != len(expected.get(file, []))
    ]
    assert not differences, "\n".join(sorted(differences))
    assert sum(map(len, lines.values())) == 695


def test_the_files_of_another_version_are_read_to_the_end() -> None:
    folder = os.environ.get(OTHER_FILES)
    if not folder:
        pytest.skip(f"{OTHER_FILES} names no folder with the files of another version")
    files = sorted(Path(folder).rglob("*rollout*.jsonl"))
    assert files
    present = sum(bool(line.strip()) for path in files for line in path.read_bytes().split(b"\n"))
    verdicts: Counter[str] = Counter()
    for line in read_lines(files):
        verdicts[line.verdict] += 1
        assert bool(remedy_for(line.verdict, line.reason)) == (line.verdict != "ok"), f"{line.origin}: {told(line)}"
        assert (line.rollout is not None) == (line.verdict in ("ok", "context")), f"{line.origin}: {told(line)}"
    assert sum(verdicts[kind] for kind in ("ok", "context", "reject", "skip")) == present, verdicts
    assert verdicts["ok"], verdicts
