from __future__ import annotations

import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from gymtrl.errors import UserError
from gymtrl.rollouts.reader import read_at, read_lines
from gymtrl.workspace.spool import spooled
from rows import row

ROWS = b"".join(json.dumps(row("6 x 7?", f"{n}", 1.0, repeat=n)).encode() + b"\n" for n in range(3))
ASKED = json.dumps({"responses_create_params": {"input": "6 x 7?"}, "_ng_task_index": 0, "_ng_rollout_index": 0})
PACKERS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def places(path: Path) -> list[bool]:
    return [read_at(line.origin) == line for line in read_lines([path])]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_is_unpacked_once_with_what_lies_beside_it(tmp_path: Path, ending: str) -> None:
    packed = tmp_path / f"rollouts.jsonl{ending}"
    packed.write_bytes(PACKERS[ending](ROWS[:100]) + PACKERS[ending](ROWS[100:]))
    (tmp_path / f"rollouts_materialized_inputs.jsonl{ending}").write_bytes(PACKERS[ending](ASKED.encode()))
    (plain,) = spooled([packed], tmp_path / "out")
    assert plain.read_bytes() == ROWS
    assert places(plain) == [True] * 3
    assert next(read_lines([plain])).rollout.input_key  # type: ignore[union-attr]
    before = plain.stat().st_mtime_ns
    assert spooled([packed], tmp_path / "out") == [plain]
    assert plain.stat().st_mtime_ns == before
    assert spooled([tmp_path], tmp_path / "out") == [plain]


def test_a_damaged_file_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    packed = tmp_path / "rollouts.jsonl.gz"
    packed.write_bytes(gzip.compress(ROWS)[:-20])
    with pytest.raises(UserError, match=r"rollouts\.jsonl\.gz is damaged"):
        spooled([packed], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("pack", [bytes, *PACKERS.values()])
def test_standard_input_is_kept_packed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pack(ROWS))))  # type: ignore[operator]
    (plain,) = spooled([Path("-")], tmp_path)
    assert plain.read_bytes() == ROWS
    assert list(tmp_path.iterdir()) == [plain]


def test_a_pipe_is_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(ROWS))
    writer.start()
    (plain,) = spooled([pipe], tmp_path / "out")
    writer.join()
    assert plain.read_bytes() == ROWS


def test_a_folder_of_plain_files_stays_itself(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_bytes(ROWS)
    assert spooled([tmp_path], tmp_path / "out") == [tmp_path]
