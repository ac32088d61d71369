from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable
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


def test_the_unpacked_is_made_anew_when_what_lies_beside_changes(tmp_path: Path) -> None:
    packed, beside = tmp_path / "rollouts.jsonl.gz", tmp_path / "rollouts_materialized_inputs.jsonl"
    packed.write_bytes(gzip.compress(ROWS))
    names = set()
    for asked in (None, ASKED, ASKED.replace("7?", "8?")):
        if asked:
            beside.write_text(asked)
        (plain,) = spooled([packed], tmp_path)
        names.add(plain)
        copy = plain.with_name(f"{plain.stem}_materialized_inputs.jsonl")
        assert (copy.read_text() if copy.exists() else None) == asked
    assert len(names) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:-1], lambda data: data + b"garbage"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damage_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, damage: Callable[[bytes], bytes]
) -> None:
    packed = tmp_path / f"rollouts.jsonl{ending}"
    packed.write_bytes(PACKERS[ending](ROWS) + damage(PACKERS[ending](ROWS)))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(packed.read_bytes())))
    for given, name in ((packed, str(packed)), (Path("-"), "standard input")):
        with pytest.raises(UserError, match=f"{re.escape(name)} is damaged") as caught:
            spooled([given], tmp_path / "out")
        assert caught.value.remedy
    assert list((tmp_path / "out" / ".spooled").iterdir()) == []


def test_an_interrupted_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(10)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Interrupted(ROWS)))
    with pytest.raises(KeyboardInterrupt):
        spooled([Path("-")], tmp_path)
    assert list((tmp_path / ".spooled").iterdir()) == []


def test_a_long_window_is_no_damage(tmp_path: Path) -> None:
    # A single frame whose header asks for a window of 1 GiB, as of `zstd --long=30`, around one raw block.
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (30 - 10) << 3])
    block = (len(ROWS) << 3 | 1).to_bytes(3, "little") + ROWS
    (tmp_path / "rollouts.jsonl.zst").write_bytes(header + block)
    (plain,) = spooled([tmp_path], tmp_path)
    assert plain.read_bytes() == ROWS


@pytest.mark.parametrize("pack", [bytes, *PACKERS.values()])
def test_standard_input_is_kept_packed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: object) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pack(ROWS))))  # type: ignore[operator]
    (plain,) = spooled([Path("-")], tmp_path)
    assert plain.read_bytes() == ROWS
    assert list(plain.parent.iterdir()) == [plain]


def test_a_pipe_is_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(ROWS))
    writer.start()
    (plain,) = spooled([pipe], tmp_path / "out")
    writer.join()
    assert plain.read_bytes() == ROWS


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    plain, both = folder / "a_rollouts.jsonl", folder / "b_rollouts.jsonl.gz"
    for path in (plain, folder / "a_rollouts.jsonl.gz", folder / "a_rollouts.jsonl.zst"):
        path.write_bytes(PACKERS.get(path.suffix, bytes)(ROWS))
    both.write_bytes(gzip.compress(ROWS))
    both.with_suffix(".zst").write_bytes(PACKERS[".zst"](ROWS))
    first = spooled([folder], folder)
    assert first == [plain, *spooled([both], folder)]
    assert first[1].parent == folder / ".spooled"
    assert spooled([folder], folder) == first
    for pattern in ("*", "**", "*/*rollouts*", "**/*.jsonl*"):
        assert spooled([tmp_path / pattern], folder) == first


def test_what_is_plain_or_missing_stays_itself(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(ROWS)
    assert spooled([tmp_path, path, tmp_path / "none.jsonl"], tmp_path / "out") == [path, path, tmp_path / "none.jsonl"]
    assert not (tmp_path / "out").exists()
