"""Tasks that were trained on are found before a model is tried on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gymtrl import FilterSettings, FormatSftSettings, TrainSftSettings, UserError, filter_rollouts, format_sft, train
from gymtrl.selection.leaks import find_leaks
from gymtrl.validation.lineage import trained_on
from gymtrl.validation.validate import require_unseen
from rows import row, write_rows
from tiny import tiny_llama

SUMS = [(a, b) for a in range(2, 8) for b in range(a + 1, 9)]


def asked(a: int, b: int) -> str:
    return f"Please work out the sum and give it as one number: {a} + {b} ="


def task(a: int, b: int) -> dict[str, Any]:
    """An input row; both orders of the numbers are twins."""
    return {
        "responses_create_params": {"input": [{"role": "user", "content": asked(a, b)}]},
        "metadata": {"twin": f"{min(a, b)} {max(a, b)}"},
        "agent_ref": {"name": "agent"},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A filter folder, whose rollouts have a system prompt that the harness put there, and their input rows beside."""
    rollouts, inputs = [], []
    for index, (a, b) in enumerate(SUMS):
        made = row(asked(a, b), str(a + b), float(index % 3 > 0), index=index)
        made["responses_create_params"]["input"].insert(0, {"role": "system", "content": "You are a calculator."})
        rollouts.append(made)
        inputs.append(task(a, b) | {"_ng_task_index": index, "_ng_rollout_index": 0})
    path = write_rows(tmp_path / "rollouts.jsonl", rollouts)
    write_rows(tmp_path / "rollouts_materialized_inputs.jsonl", inputs)
    settings = FilterSettings(reward_threshold=1.0, cluster="metadata.twin", validation=0.3, dedup="none")
    return filter_rollouts([path], tmp_path / "filtered", settings).path


def sums_of(path: Path) -> list[tuple[int, int]]:
    rows = [json.loads(line) for line in path.open()]
    texts = [one["responses_create_params"]["input"][-1]["content"] for one in rows]
    return [(int(text.split()[-4]), int(text.split()[-2])) for text in texts]


def test_what_the_filter_held_out_is_clean(folder: Path) -> None:
    assert len(sums_of(folder / "heldout_inputs.jsonl")) > 3
    assert find_leaks(folder / "heldout_inputs.jsonl", folder) == []


def test_a_task_its_twin_and_one_with_another_prompt_are_found(folder: Path, tmp_path: Path) -> None:
    a, b = sums_of(folder / "train.jsonl")[0]
    changed = task(a, b) | {"metadata": {}}
    changed["responses_create_params"]["input"].insert(0, {"role": "system", "content": "Answer at once."})
    fresh = [task(2, 90), task(3, 91)]
    tasks = write_rows(tmp_path / "tasks.jsonl", [fresh[0], task(a, b), task(b, a), fresh[1], changed])
    assert [(leak.line, leak.by) for leak in find_leaks(tasks, folder)] == [
        (2, "input_key"),
        (3, "cluster"),
        (5, "text"),
    ]


def test_rollouts_that_were_dropped_count_too(folder: Path, tmp_path: Path) -> None:
    held_out = sums_of(folder / "heldout_inputs.jsonl")
    a, b = next(pair for pair in sums_of(folder / "dropped.jsonl") if pair not in held_out)
    (leak,) = find_leaks(write_rows(tmp_path / "tasks.jsonl", [task(a, b)]), folder)
    assert (
        leak.by == "input_key"
        and json.loads((tmp_path / "rollouts.jsonl").open().readlines()[int(leak.rollout.rpartition(":")[2]) - 1])[
            "reward"
        ]
        == 0.0
    )


def test_rollouts_without_input_rows_are_compared_by_what_the_user_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts_materialized_inputs.jsonl").unlink()
    tasks = write_rows(tmp_path / "tasks.jsonl", [task(*SUMS[0]), task(2, 90)])
    (leak,) = find_leaks(tasks, tmp_path / "rollouts.jsonl")
    assert (leak.line, leak.by) == (1, "text")


def test_a_checkpoint_leads_to_the_rollouts_of_every_round(folder: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    model, runs = tiny_llama(tmp_path / "tiny", smollm2_dir), []
    plain_rollouts = write_rows(tmp_path / "second.jsonl", [row(f"Say {n}", str(n), 1.0, index=n) for n in range(4)])
    for name, source in (("first", folder), ("second", plain_rollouts)):
        dataset = tmp_path / f"{name}-dataset"
        format_sft(source, dataset, FormatSftSettings(model=str(model)))
        train(dataset, tmp_path / name, TrainSftSettings(max_steps=1, method="full"))
        runs.append(tmp_path / name)
        model = tmp_path / name / "model"
    first, second = runs
    assert trained_on(first) == [folder] and trained_on(second) == trained_on(model) == [plain_rollouts, folder]
    held_out = folder / "heldout_inputs.jsonl"
    require_unseen(held_out, second)
    leaking = write_rows(tmp_path / "tasks.jsonl", [task(*sums_of(folder / "train.jsonl")[0])])
    with pytest.raises(UserError, match=r"1 of the tasks .* line 1 has its input row in common with .*rollouts.jsonl:"):
        require_unseen(leaking, second)
    require_unseen(leaking, second, plain_rollouts)
    with pytest.raises(UserError, match="nothing says which rollouts"):
        require_unseen(leaking, tmp_path / "tiny")
    folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="not there any more"):
        require_unseen(leaking, second)
