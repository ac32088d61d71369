"""The benchmark of `format sft` lets no difference between its sides pass that it cannot explain."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format import BASELINES, SIDES, agreement, phase_of

from gymtrl.models.fingerprint import load_tokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ROWS = [  # text and whether it is trained, by our side and by the other
    (("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant", 0, 0), ("\n", 0, 1), ("a<|im_end|>", 1, 1), ("\n", 0, 1)),
    (("<|im_start|>user\n", 0, 0), ("q", 0, 1), ("<|im_end|>\n<|im_start|>assistant\n", 0, 0), ("a<|im_end|>", 1, 1)),
    (("<|im_start|>assistant\n", 0, 0), ("a<|im_end|>", 1, 0)),
]


def write_sides(folder: Path, model: Path, texts: tuple[str, str] | None = None) -> None:
    """The rows as both sides would leave them; with `texts`, one row whose text the sides tell differently."""
    tokenizer = load_tokenizer(str(model))
    (folder / "ours" / "data").mkdir(parents=True)
    for side, path in enumerate((folder / "ours" / "data" / "train-0.parquet", folder / "naive.parquet")):
        rows = ROWS if texts is None else [((texts[side], 1, 1),)]
        made: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for row in rows:
            pieces = [(tokenizer(piece, add_special_tokens=False)["input_ids"], trained) for piece, *trained in row]
            made["input_ids"].append([token for ids, _ in pieces for token in ids])
            made["labels"].append([token if trained[side] else -100 for ids, trained in pieces for token in ids])
        pq.write_table(pa.table(made), path)


def test_only_line_breaks_around_a_turn_are_an_explained_difference(smollm2_tools_dir: Path, tmp_path: Path) -> None:
    write_sides(tmp_path, smollm2_tools_dir)
    found = agreement(load_tokenizer(str(smollm2_tools_dir)), tmp_path, "naive")
    assert found == {
        **{"rows": 3, "same_ids": 3, "same_loss_tokens": 0, "unexplained": 2, "loss_on_other": 3},
        **{"loss_on_line_break_before_turn": 1, "loss_on_line_break_after_turn": 1},
    }


@pytest.mark.parametrize(("theirs", "unexplained"), [("it is 3.1415926536", 0), ("it was 3.141592653589793", 1)])
def test_another_text_is_explained_by_rounding_alone(
    smollm2_tools_dir: Path, tmp_path: Path, theirs: str, unexplained: int
) -> None:
    write_sides(tmp_path, smollm2_tools_dir, ("it is 3.141592653589793", theirs))
    found = agreement(load_tokenizer(str(smollm2_tools_dir)), tmp_path, "naive")
    assert (found["other_text"], found["unexplained"]) == (1, unexplained)


def test_what_a_check_needs_belongs_to_the_checks() -> None:
    decoding = ("/x/transformers/tokenization_utils_base.py", "decode")
    check = ("/x/gymtrl/formats/checks.py", "check_row")
    assert phase_of({decoding, check}) == "checks"
    assert phase_of({decoding}) == "other"


@pytest.mark.slow
def test_the_quick_benchmark_writes_its_figures(gym_site_packages: Path, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "format.py", gym_site_packages, "--quick"]
    run = subprocess.run(
        [*command, "--work", tmp_path / "work", "--out", tmp_path / "format.json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "format.json").read_text()
    assert str(tmp_path) not in text and str(gym_site_packages) not in text
    written = json.loads(text)
    assert set(written["sides"]) == set(written["compared"]) == set(SIDES)
    assert written["corpus"]["tokens"] > written["corpus"]["loss_tokens"] > 0
    assert sum(written["phases"].values()) == pytest.approx(1, abs=0.02)
    for name, rates in written["compared"].items():
        assert set(rates) == {"rows_per_s", "tokens_per_s", *(f"times_as_fast_as_{base}" for base in BASELINES)}
        assert written["sides"][name]["wall_s"] > written["sides"][name]["work_s"] > 0
    for facts in written["agreement"].values():
        assert facts["rows"] == facts["same_ids"] == written["corpus"]["rows"]
        assert facts["unexplained"] == 0
    assert written["agreement"]["trl"]["loss_on_line_break_after_turn"] >= written["corpus"]["rows"]
    assert written["agreement"]["ours_engine"]["same_loss_tokens"] == written["corpus"]["rows"]
    assert len(written["memory"]["rows"]) == 2
