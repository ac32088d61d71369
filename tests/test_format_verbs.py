"""What holds for every dataset made of good and bad rollouts, whatever the objective."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gymtrl import (
    FilterSettings,
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatRewardSettings,
    UserError,
    filter_rollouts,
    format_dpo,
    format_grpo,
    format_kto,
    format_reward,
)
from gymtrl.formats.source import format_inputs
from gymtrl.workspace.artefact import up_to_date
from rows import row, write_rows
from tool_rows import cut, recorded, tool_row

COLLECTED = Path(__file__).parent / "data" / "reasoning-gym-8x.jsonl"

Verb = tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]
VERBS: dict[str, Verb] = {
    "dpo": (format_dpo, FormatDpoSettings, {}),
    "trajectories": (format_dpo, FormatDpoSettings, {"kind": "trajectory"}),
    "reward": (format_reward, FormatRewardSettings, {}),
    "kto": (format_kto, FormatKtoSettings, {}),
    "prompts": (format_grpo, FormatGrpoSettings, {}),
    "groups": (format_grpo, FormatGrpoSettings, {"kind": "groups"}),
}
each_verb = pytest.mark.parametrize("name", VERBS)


def make(name: str, source: Path, out: Path, model: Path, **settings: Any) -> Any:
    verb, kind, fixed = VERBS[name]
    return verb(source, out, kind(model=str(model), **fixed | settings))


def tasks(tokenizer: PreTrainedTokenizerBase, number: int = 12) -> list[dict[str, Any]]:
    """Tasks with two good and two bad rollouts, and one each that was cut off, is spoiled, and has no reward."""
    made = []
    for task in range(number):
        asked = f"Weigh thing {task}."
        for repeat in range(4):
            steps = [("it", f"{task} pounds")] * (1 + repeat % 2)
            answer = f"{'heavy' if repeat < 2 else 'light'} {repeat}"
            made.append(tool_row(asked, steps, answer, float(repeat < 2), index=task, repeat=repeat))
        unfinished = tool_row(asked, [("it", f"{task} pounds")], "It is hea", 0.0, index=task, repeat=4)
        made.append(cut(recorded(unfinished, tokenizer)))
        made.append(tool_row(asked, [], "The scales broke", 0.0, index=task, repeat=5, mask_sample=True))
        made.append(tool_row(asked, [], "unscored", None, index=task, repeat=6))
    return made


@pytest.fixture
def rollouts(tmp_path: Path, smollm2_tools_dir: Path) -> Path:
    path = write_rows(tmp_path / "rollouts.jsonl", tasks(AutoTokenizer.from_pretrained(smollm2_tools_dir)))
    with path.open("ab") as stream:
        stream.write(b"broken\n")
    return path


def rows_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((folder / "data").glob("*.parquet")):
        found[path.name.partition("-")[0]] += pq.read_table(path).to_pylist()
    return found


def lines_of(rows: list[dict[str, Any]]) -> set[int]:
    return {row[column] for row in rows for column in ("line", "chosen_line", "rejected_line") if column in row}


@each_verb
@pytest.mark.parametrize("filtered", [False, True])
def test_every_line_is_used_or_dropped_with_a_reason_in_words(
    name: str, filtered: bool, rollouts: Path, tmp_path: Path, smollm2_tools_dir: Path
) -> None:
    source = rollouts
    if filtered:
        source = tmp_path / "filtered"
        filter_rollouts([rollouts], source, FilterSettings(validation=0.3, cap_per_task=1))
    result = make(name, source, tmp_path / "out", smollm2_tools_dir)
    rows, dropped = rows_of(result.path), pq.read_table(result.path / "dropped.parquet").to_pylist()
    used = lines_of(rows["train"] + rows["validation"])
    assert sorted([*used, *(entry["line"] for entry in dropped)]) == list(range(1, 7 * 12 + 2))
    assert result.counts.read == 85 and result.counts.written == len(used)
    assert bool(rows["validation"]) == filtered
    assert {entry["file"] for entry in dropped} == {str(rollouts)}
    assert all(len(entry["detail"].split()) > 2 for entry in dropped), dropped
    reasons = {entry["line"]: entry["reason"] for entry in dropped}
    # Of a group, what the world spoiled is a part, and so is what was cut off; this is in no other dataset.
    world = [line % 7 in (6, 0) for line in range(1, 85) if line in used]
    assert any(world) == (name == "groups")
    cut_off = range(5, 85, 7)
    assert used.issuperset(cut_off) if name == "groups" else all(reasons[line] == "truncated" for line in cut_off)
    assert reasons[85].startswith("reject:")
    train, validation = ({row["cluster_key"] for row in rows[side]} for side in ("train", "validation"))
    assert train and not train & validation
    card = (result.path / "README.md").read_text()
    assert f"Lines read 85, used {len(used)}, dropped {len(dropped)}" in card


@each_verb
def test_folders_load_as_they_are_and_views_gain_no_key(
    name: str, rollouts: Path, tmp_path: Path, smollm2_tools_dir: Path
) -> None:
    from datasets import load_dataset

    make(name, rollouts, tmp_path / "out", smollm2_tools_dir)
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and len(loaded["train"])
    for entry in loaded["train"]:
        record = json.loads(entry["record_json"])
        assert {view: entry[view] for view in record} == record
        assert record["tools"][0]["function"]["parameters"]["properties"] == {"x": {"type": "string", "default": None}}
        for ids, mask in (("chosen_ids", "chosen_mask"), ("completion_ids", "completion_mask")):
            assert mask not in entry or (len(entry[ids]) == len(entry[mask]) and set(entry[mask]) == {0, 1})


@each_verb
def test_the_same_bytes_and_settings_make_the_same_rows(
    name: str, rollouts: Path, tmp_path: Path, smollm2_tools_dir: Path
) -> None:
    first, second = (make(name, rollouts, tmp_path / out, smollm2_tools_dir).path for out in ("one", "two"))
    for path in (*first.rglob("*.parquet"), first / "README.md"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dpo", {"reward_threshold": 0.5}),
        ("dpo", {"strategy": "margin"}),
        ("dpo", {"kind": "trajectory"}),
        ("reward", {"seed": 1}),
        ("kto", {"cap_per_task": 1}),
        ("prompts", {"pass_rate": "0.2-0.8"}),
        ("prompts", {"kind": "groups"}),
    ],
)
def test_a_changed_setting_makes_the_dataset_out_of_date(
    name: str, change: dict[str, Any], rollouts: Path, tmp_path: Path, smollm2_tools_dir: Path
) -> None:
    out = make(name, rollouts, tmp_path / "out", smollm2_tools_dir).path
    kind, fixed = VERBS[name][1:]

    def fresh(**more: Any) -> bool:
        settings = kind(model=str(smollm2_tools_dir), **fixed | more)
        verb = f"format {'grpo' if name == 'prompts' else name}"
        return up_to_date(out, verb=verb, settings=settings, inputs=format_inputs(rollouts, settings)) is not None

    assert fresh() and not fresh(**change)


def good_only(tmp_path: Path) -> Path:
    made = [row(f"q{i}", f"a{repeat}", 1.0, index=i, repeat=repeat) for i in range(3) for repeat in range(2)]
    return write_rows(tmp_path / "good.jsonl", made)


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("dpo", "6 no_bad_rollout", "collect more repeats"),
        ("reward", "6 no_bad_rollout", "collect more repeats"),
        ("kto", "there is no bad rollout", "train with SFT"),
        ("prompts", "solved_too_often", "--pass-rate"),
        ("groups", "6 no_variance", "collect more repeats"),
    ],
)
def test_one_kind_of_rollout_is_not_enough(
    name: str, message: str, remedy: str, tmp_path: Path, smollm2_dir: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(name, good_only(tmp_path), tmp_path / "out", smollm2_dir, reward_threshold=1.0)
    assert remedy in (caught.value.remedy or "")
    assert [path.name for path in tmp_path.iterdir()] == ["good.jsonl"]


@pytest.mark.parametrize("name", ["dpo", "reward", "kto", "prompts"])
def test_what_is_good_must_be_known_and_only_once(
    name: str, rollouts: Path, tmp_path: Path, smollm2_tools_dir: Path
) -> None:
    signed = [row(f"q{i}", f"a{n}", reward, index=i) for i in range(3) for n, reward in enumerate((3.0, 1.5, -7.0))]
    source = write_rows(tmp_path / "signed.jsonl", signed)
    with pytest.raises(UserError, match="not for gymtrl to say") as caught:
        make(name, source, tmp_path / "out", smollm2_tools_dir)
    assert "--reward-threshold" in (caught.value.remedy or "")
    assert make(name, source, tmp_path / "named", smollm2_tools_dir, reward_threshold=3.0).counts.written
    filter_rollouts([rollouts], tmp_path / "filtered", FilterSettings())
    with pytest.raises(UserError, match="filtered with a threshold already") as caught:
        make(name, tmp_path / "filtered", tmp_path / "out", smollm2_tools_dir, reward_threshold=0.5)
    assert "leave out --reward-threshold" in (caught.value.remedy or "")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_show_the_rows_is_told(rollouts: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    for name in VERBS:
        with pytest.raises(UserError, match="template_without_tools") as caught:
            make(name, rollouts, tmp_path / "out", smollm2_dir)
        assert "knows tools" in (caught.value.remedy or ""), name
    assert not (tmp_path / "out").exists()


def test_killed_on_the_way_no_folder_is_there_and_the_next_run_makes_it(tmp_path: Path, smollm2_dir: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from gymtrl import *\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "source, out, model = sys.argv[1:]\n"
        "settings = FormatKtoSettings(model=model, reward_threshold=1.0)\n"
        "format_kto(Path(source), Path(out), settings, on_row=die)\n"
    )
    arguments = [str(COLLECTED), str(tmp_path / "out"), str(smollm2_dir)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=dict(os.environ), capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    make("kto", COLLECTED, tmp_path / "out", smollm2_dir, reward_threshold=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_collected_rollouts_are_used_or_dropped_behind_a_filter(tmp_path: Path, smollm2_dir: Path) -> None:
    filter_rollouts([COLLECTED], tmp_path / "filtered", FilterSettings(validation=0.25, reward_threshold=1.0))
    table = pl.read_parquet(tmp_path / "filtered" / "table.parquet")
    for name in VERBS:
        result = make(name, tmp_path / "filtered", tmp_path / name, smollm2_dir)
        assert result.counts.read == len(table) == 128
        rows = rows_of(result.path)
        train, validation = ({row["task_key"] for row in rows[side]} for side in ("train", "validation"))
        assert train and not train & validation, name
