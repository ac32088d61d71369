"""Artefact folders: whole or absent, resumed, never run twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from gymtrl.errors import RunError, UserError
from gymtrl.workspace.artefact import Counts, artefact, read_manifest, up_to_date


class Settings(BaseModel):
    value: int = 1


def write(out: Path, source: Path, *, value: int = 1, text: str = "x") -> None:
    with artefact(out, verb="test", settings=Settings(value=value), inputs=[source]) as draft:
        (draft.path / "data").write_text(text)
        draft.counts = Counts(read=3, written=1, dropped={"why": 2})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "input.jsonl"
    path.write_text("one\n")
    return path


def test_manifest_says_what_was_done(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.verb == "test"
    assert manifest.settings == {"value": 1}
    assert manifest.counts == Counts(3, 1, {"why": 2})
    assert manifest.inputs[0].sha256 == "2c8b08da5ce60398e1f19af0e5dccc744df274b826abe585eaba68c525434806"
    assert manifest.started <= manifest.ended


def test_failure_leaves_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ZeroDivisionError), artefact(tmp_path / "out", verb="t", settings=Settings(), inputs=[source]):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["input.jsonl"]


def test_failure_keeps_the_older_folder(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source, text="old")
    with (
        pytest.raises(ZeroDivisionError),
        artefact(tmp_path / "out", verb="test", settings=Settings(), inputs=[source]),
    ):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "data").read_text() == "old"


def test_rows_cannot_be_lost(tmp_path: Path, source: Path) -> None:
    with (
        pytest.raises(AssertionError),
        artefact(tmp_path / "o", verb="t", settings=Settings(), inputs=[source]) as draft,
    ):
        draft.counts = Counts(read=3, written=1, dropped={"why": 1})
    assert not (tmp_path / "o").exists()


def test_up_to_date_until_input_or_settings_change(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    write(out, source)
    assert up_to_date(out, verb="test", settings=Settings(), inputs=[source])
    assert not up_to_date(out, verb="test", settings=Settings(value=2), inputs=[source])
    assert not up_to_date(out, verb="other", settings=Settings(), inputs=[source])
    source.write_text("two\n")
    assert not up_to_date(out, verb="test", settings=Settings(), inputs=[source])


def test_foreign_folder_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="was not written by gymtrl"):
        write(tmp_path / "out", source)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_stage_never_replaces_what_it_reads_or_another_stage(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source)
    with pytest.raises(UserError, match="holds what 'test' reads"):
        write(tmp_path / "out", tmp_path / "out" / "data")
    with (
        pytest.raises(UserError, match="holds what 'test' wrote, not 'other'"),
        artefact(tmp_path / "out", verb="other", settings=Settings(), inputs=[source]),
    ):
        pass
    assert (tmp_path / "out" / "data").read_text() == "x"
    with pytest.raises(UserError, match="no name"):
        write(Path("."), source)


def test_settings_that_change_no_result_may_differ(tmp_path: Path, source: Path) -> None:
    class Patient(BaseModel):
        value: int = 1
        timeout: int = Field(default=5, json_schema_extra={"changes_result": False})

    opened = artefact(tmp_path / "o", verb="t", settings=Patient(), inputs=[source], resumable=True)
    with pytest.raises(KeyboardInterrupt), opened:
        raise KeyboardInterrupt
    with artefact(tmp_path / "o", verb="t", settings=Patient(timeout=9), inputs=[source], resumable=True) as draft:
        assert draft.resumed
    assert up_to_date(tmp_path / "o", verb="t", settings=Patient(timeout=3), inputs=[source])
    assert not up_to_date(tmp_path / "o", verb="t", settings=Patient(value=3), inputs=[source])


def test_resumable_keeps_what_was_written_for_the_same_work_only(tmp_path: Path, source: Path) -> None:
    def attempt(value: int, fail: bool) -> tuple[bool, bool]:
        opened = artefact(tmp_path / "o", verb="t", settings=Settings(value=value), inputs=[source], resumable=True)
        with opened as draft:
            had = (draft.path / "part").exists()
            (draft.path / "part").write_text("x")
            if fail:
                raise KeyboardInterrupt
            return draft.resumed, had

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            attempt(1, True)
    assert attempt(1, False) == (True, True)
    with pytest.raises(KeyboardInterrupt):
        attempt(2, True)
    assert attempt(3, False) == (False, False)


def test_what_is_kept_need_not_depend_on_every_setting(tmp_path: Path, source: Path) -> None:
    class Both(BaseModel):
        early: int = 1
        late: int = 1

    def attempt(settings: Both, fail: bool) -> bool:
        inputs, by = [source], {"early"}
        opened = artefact(tmp_path / "o", verb="t", settings=settings, inputs=inputs, resumable=True, resumed_by=by)
        with opened as draft:
            if fail:
                raise KeyboardInterrupt
            return draft.resumed

    with pytest.raises(KeyboardInterrupt):
        attempt(Both(), True)
    assert attempt(Both(late=2), False)
    assert not up_to_date(tmp_path / "o", verb="t", settings=Both(), inputs=[source])
    with pytest.raises(KeyboardInterrupt):
        attempt(Both(late=2), True)
    assert not attempt(Both(early=2), False)


def test_two_processes_cannot_write_one_folder(tmp_path: Path, source: Path) -> None:
    code = (
        "from pathlib import Path; from test_artefact import write;"
        f"write(Path({str(tmp_path / 'out')!r}), Path({str(source)!r}))"
    )
    with artefact(tmp_path / "out", verb="test", settings=Settings(), inputs=[source]):
        other = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "another process is writing" in other.stderr


def test_full_disk_is_a_run_error(tmp_path: Path, source: Path) -> None:
    with (
        pytest.raises(RunError, match="No space left"),
        artefact(tmp_path / "out", verb="t", settings=Settings(), inputs=[source]),
    ):
        Path("/dev/full").write_text("x" * 10000)
    assert not (tmp_path / "out").exists()
