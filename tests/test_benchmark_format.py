"""The benchmark of `format sft` lets no difference between its sides pass that it cannot explain."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format import agreement, phase_of

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
