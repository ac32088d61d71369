from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

import polars as pl
import psutil
import pytest
from polars.testing import assert_frame_equal

from gymtrl.errors import RunError, UserError
from gymtrl.rollouts import pieces, reader, scan
from gymtrl.rollouts.pieces import Piece, scan_with_workers
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.scan import read_facts, table_for, write_table
from gymtrl.rollouts.table import rollout_table
from rows import row, write_rows


def scanned(inputs: list[Path], tmp_path: Path, **options: object) -> pl.DataFrame:
    out = tmp_path / "table.parquet"
    write_table(inputs, out, **options)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    return pl.read_parquet(out)


@pytest.mark.parametrize(("piece_bytes", "workers"), [(16_000_000, 1), (20_000, 1), (100_000, 2)])
def test_pieces_and_processes_change_nothing(
    gym_site_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, workers: int
) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", piece_bytes)
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    assert_frame_equal(scanned(files, tmp_path, workers=workers), rollout_table(read_lines(files)))


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000])
def test_lines_are_whole_and_numbered_wherever_a_piece_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", piece_bytes)
    sound = json.dumps(row("6 x 7?", "42", 1.0)).encode()
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\n\r\n" + sound + b"\r\n \n" + b"x" * 3000 + b"\n\n" + sound + b"\n{}\n\n" + sound)
    table = scanned([path], tmp_path, workers=1, max_line_bytes=2000)
    assert_frame_equal(table, rollout_table(read_lines([path], max_line_bytes=2000)))
    assert table["line"].to_list() == [3, 5, 7, 8, 10]


def test_progress_adds_up_to_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", 100)
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0)] * 5)
    seen: list[int] = []
    scanned([path], tmp_path, on_bytes=seen.append)
    assert sum(seen) == path.stat().st_size and len(seen) > 5


def test_components_of_the_reward_get_columns_even_if_seen_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", 100)
    rows = [row("a", "b", 1.0), row("a", "c", 0.5, reward_components={"style": 0.25, "form": True}), row("a", "d", 0.0)]
    table = scanned([write_rows(tmp_path / "rollouts.jsonl", rows)], tmp_path)
    assert table.columns[-2:] == ["reward_form", "reward_style"]
    assert table["reward_style"].to_list() == [None, 0.25, None]


def test_a_cluster_that_no_row_has_is_an_error_whatever_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", 300)
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0), row("b", "b", 1.0, index=1, family="x")])
    assert scanned([path], tmp_path, cluster="family")["flags"].to_list() == [["cluster_missing"], []]
    with pytest.raises(UserError, match="none of the 2 rollouts"):
        scanned([path], tmp_path, cluster="famly")


def test_a_table_serves_as_input_until_its_files_change(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0, family="x")])
    table = tmp_path / "table.parquet"
    write_table([path], table, cluster="family")
    facts = read_facts(table)
    assert facts is not None and ([file.path for file in facts.files], facts.cluster) == ([str(path)], "family")
    assert table_for([table], tmp_path) == table_for([table], tmp_path, cluster="family") == table
    with pytest.raises(UserError, match="made with the cluster 'family'"):
        table_for([table], tmp_path, cluster="other")
    write_rows(path, [row("longer", "b", 1.0)])
    with pytest.raises(UserError, match="has changed"):
        table_for([table], tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        table_for([table], tmp_path)


def test_what_a_process_meets_is_told_as_one_process_would(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0)])
    sound, lost = (Piece(str(p), 0, 100, None, 1_000_000, str(tmp_path / p.stem)) for p in (path, tmp_path / "gone"))
    with pytest.raises(UserError, match="gone is gone") as told:
        list(scan_with_workers([sound, lost], 2))
    assert told.value.remedy


def test_a_process_that_is_killed_is_told_and_the_others_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "waits")  # whoever opens it waits for a writer
    piece = Piece(str(tmp_path / "waits"), 0, 100, None, 1_000_000, str(tmp_path / "t"))
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}

    def workers() -> list[psutil.Process]:
        return [child for child in me.children(recursive=True) if child.pid not in before]

    def kill_one() -> None:
        while len(workers()) < 2:
            time.sleep(0.02)
        workers()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RunError, match="has died"):
        list(scan_with_workers([piece] * 4, 2))
    killer.join()
    assert workers() == []


def test_processes_do_not_run_what_lies_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "polars.py").write_text("raise SystemExit('ran')")
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0)])
    monkeypatch.chdir(tmp_path)
    write_table([path] * 1, tmp_path / "table.parquet", workers=2)
    monkeypatch.setattr(scan, "PIECE_BYTES", 100)
    write_table([path], tmp_path / "table.parquet", workers=2)


def test_a_line_without_end_is_passed_over_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE_BYTES", 10_000)
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    read: list[int] = []
    monkeypatch.setattr(reader, "_CHUNK", 1000)
    first_line = reader._first_line_from

    def counted(stream: BinaryIO, start: int, stop: float) -> int:
        read.append(first_line(stream, start, stop) - start)
        return start + read[-1]

    monkeypatch.setattr(reader, "_first_line_from", counted)
    assert scanned([path], tmp_path, workers=1, max_line_bytes=1000)["reason"].to_list() == ["line_too_long"]
    assert max(read) < 20_000


def test_many_short_lines_are_held_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LINES_A_TABLE", 7)
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"{}\n\n" * 50 + json.dumps(row("a", "b", 1.0)).encode())
    assert_frame_equal(scanned([path], tmp_path), rollout_table(read_lines([path])))


@pytest.mark.parametrize("change", ["same size", "input rows"])
def test_a_table_is_refused_when_what_it_was_made_from_changes(tmp_path: Path, change: str) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [row("a", "b", 1.0)])
    table = tmp_path / "table.parquet"
    write_table([path], table)
    if change == "same size":
        os.utime(path, ns=(0, 0))
    else:
        write_rows(tmp_path / "rollouts_materialized_inputs.jsonl", [{"_ng_task_index": 0, "_ng_rollout_index": 0}])
    with pytest.raises(UserError, match="changed since"):
        table_for([table], tmp_path)


def test_other_parquet_files_are_no_tables(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(other)
    with pytest.raises(UserError, match="no rollout table"):
        table_for([other], tmp_path)
    with pytest.raises(UserError, match="stands alone"):
        table_for([other, other], tmp_path)
