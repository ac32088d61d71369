"""Tasks that were trained on are found before a model is tried on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gymtrl import FilterSettings, FormatSftSettings, TrainSftSettings, UserError, filter_rollouts, format_sft, train
from gymtrl.gym.settings import CollectSettings
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.scan import write_table
from gymtrl.rollouts.sidecars import inputs_beside
from gymtrl.selection import leaks
from gymtrl.selection.leaks import find_leaks
from gymtrl.selection.lines import read_rollout
from gymtrl.validation.lineage import trained_on
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import require_unseen
from gymtrl.workspace.artefact import artefact, sha256_of
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


def recorded_run(out: Path, source: Path, model: Path) -> Path:
    """What a run leaves that tells of its data: no more than its manifest and a model."""
    inputs = [source, *([beside] if (beside := inputs_beside(source)) else [])]
    with artefact(out, verb="train sft", settings=TrainSftSettings(), inputs=[model]) as draft:
        (draft.path / "model").mkdir()
        (draft.path / "model" / "config.json").write_text(f'{{"name": "{out.name}"}}')
        told = [{"path": str(path), "sha256": sha256_of(path)} for path in inputs]
        draft.extra.update({"dataset_inputs": told, "model": str(model)})
    return out


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> list[Path]:
    """Two rounds of training: on the filter folder, and from there on other rollouts."""
    base = tmp_path / "tiny"
    base.mkdir()
    (base / "config.json").write_text("{}")
    second = collected(tmp_path / "second.jsonl", [asking(f"Say {n}") for n in range(4)])
    first = recorded_run(tmp_path / "first", folder, base)
    return [first, recorded_run(tmp_path / "second", second, first / "model")]


def test_training_leaves_what_leads_to_its_rollouts(folder: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    model = tiny_llama(tmp_path / "tiny", smollm2_dir)
    plain_rollouts = write_rows(tmp_path / "second.jsonl", [row(f"Say {n}", str(n), 1.0, index=n) for n in range(4)])
    for name, source in (("first", folder), ("second", plain_rollouts)):
        dataset = tmp_path / f"{name}-dataset"
        format_sft(source, dataset, FormatSftSettings(model=str(model)))
        train(dataset, tmp_path / name, TrainSftSettings(max_steps=1, method="full"))
        model = tmp_path / name / "model"
    assert [(one.path, one.state) for one in trained_on(model)] == [
        (plain_rollouts, "as it was"),
        (folder, "as it was"),
    ]
    require_unseen(folder / "heldout_inputs.jsonl", model)
    with pytest.raises(UserError, match="1 of the tasks"):
        require_unseen(write_rows(tmp_path / "t.jsonl", [task(*sums_of(folder / "train.jsonl")[0])]), model)


def test_a_checkpoint_leads_to_the_rollouts_of_every_round(
    folder: Path, tmp_path: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = runs
    plain_rollouts = tmp_path / "second.jsonl"

    def sources(checkpoint: Path) -> list[Path]:
        return [one.path for one in trained_on(checkpoint)]

    assert sources(first) == [folder]
    assert sources(second) == sources(second / "model") == [plain_rollouts, folder]
    monkeypatch.chdir(second / "model")
    assert sources(Path()) == sources(Path("../../second")) == [plain_rollouts, folder]
    held_out = folder / "heldout_inputs.jsonl"
    require_unseen(held_out, second)
    leaking = write_rows(tmp_path / "tasks.jsonl", [task(*sums_of(folder / "train.jsonl")[0])])
    for more in ((), (plain_rollouts,)):
        with pytest.raises(UserError, match=r"1 of the tasks .* line 1 has its input row in common with .*rollouts.js"):
            require_unseen(leaking, second, more)
    with pytest.raises(UserError, match="nothing says which rollouts"):
        require_unseen(leaking, tmp_path / "tiny")


def test_rollouts_that_moved_or_changed_are_asked_for(folder: Path, tmp_path: Path, runs: list[Path]) -> None:
    held_out, elsewhere = folder / "heldout_inputs.jsonl", tmp_path / "moved"
    tasks = write_rows(tmp_path / "tasks.jsonl", [json.loads(line) for line in held_out.open()])
    folder.rename(elsewhere)
    for given in ([], [tmp_path / "second.jsonl"]):
        with pytest.raises(UserError, match="filtered, which is not there any more"):
            require_unseen(tasks, runs[1], given)
    require_unseen(tasks, runs[1], [elsewhere])
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        require_unseen(tasks, runs[1], [tmp_path / "nowhere.jsonl"])
    again = FilterSettings(reward_threshold=1.0, cluster="metadata.twin", validation=0.3, dedup="none", split_salt="b")
    filter_rollouts([tmp_path / "rollouts.jsonl"], folder, again)
    with pytest.raises(UserError, match="filtered, which has changed since"):
        require_unseen(held_out, runs[1])
    with pytest.raises(UserError, match="of the tasks"):
        require_unseen(held_out, runs[1], [elsewhere])


def test_an_earlier_round_that_is_gone_is_asked_for(folder: Path, tmp_path: Path, runs: list[Path]) -> None:
    held_out = folder / "heldout_inputs.jsonl"
    runs[0].rename(tmp_path / "renamed")
    assert [(one.path, one.state) for one in trained_on(runs[1])] == [
        (tmp_path / "second.jsonl", "as it was"),
        (runs[0] / "model", "gone"),
    ]
    with pytest.raises(UserError, match=r"goes back to .*first/model, which is not there any more"):
        require_unseen(held_out, runs[1])
    require_unseen(held_out, runs[1], [folder])
    shutil.copytree(tmp_path / "renamed", runs[0])
    (runs[0] / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="first/model, which has changed since"):
        require_unseen(held_out, runs[1])


def test_the_input_rows_beside_rollouts_belong_to_them(tmp_path: Path, runs: list[Path]) -> None:
    tasks = write_rows(tmp_path / "tasks.jsonl", [task(50, 60)])
    require_unseen(tasks, runs[1])
    rows = [json.loads(line) for line in (tmp_path / "second.jsonl").open()]
    beside = tmp_path / "second_materialized_inputs.jsonl"
    for path, change in ((beside, beside.unlink), (tmp_path / "second.jsonl", None)):
        change() if change else write_rows(path, rows[:-1])
        with pytest.raises(UserError, match=r"second\.jsonl, which has changed since"):
            require_unseen(tasks, runs[1])


@pytest.mark.parametrize("given", ["one", Path("one"), ["one"]])
def test_one_source_may_be_named_alone(given: Any) -> None:
    assert ValidateSettings(baseline="model", training=given).training == [Path("one")]


def question(n: int) -> str:
    return f"What is {n} plus {n * 3} times {n + 7}, as one number, please work it out with care?"


def asking(text: str, *, system: str | None = None, agent: str = "agent", **more: Any) -> dict[str, Any]:
    """An input row."""
    system_turn = [{"role": "system", "content": system}] if system else []
    turns = [*system_turn, {"role": "user", "content": text}]
    return {"responses_create_params": {"input": turns}, "agent_ref": {"name": agent}} | more


def collected(path: Path, asked: Sequence[dict[str, Any]], *, repeats: int = 2) -> Path:
    """Rollouts of input rows, good and bad, and the rows beside them."""
    rollouts, inputs = [], []
    for index, one in enumerate(asked):
        for repeat in range(repeats):
            made = row("", f"answer {repeat}", float(repeat), index=index, repeat=repeat)
            made["responses_create_params"]["input"] = one["responses_create_params"]["input"]
            rollouts.append(made | {"agent_ref": one["agent_ref"]})
            inputs.append(one | {"_ng_task_index": index, "_ng_rollout_index": repeat})
    write_rows(path.with_name(f"{path.stem}_materialized_inputs.jsonl"), inputs)
    return write_rows(path, rollouts)


def filtered(rollouts: Path, **settings: Any) -> Path:
    chosen = FilterSettings(reward_threshold=1.0, dedup="none", **settings)
    return filter_rollouts([rollouts], rollouts.parent / "chosen", chosen).path


def leaks_of(folder: Path, tasks: Sequence[dict[str, Any]], source: Path) -> list[tuple[int, str]]:
    return [(leak.line, leak.by) for leak in find_leaks(write_rows(folder / "asked.jsonl", tasks), source)]


def test_what_no_objective_takes_was_not_trained_on(tmp_path: Path) -> None:
    asked = [asking(question(n), agent="math" if n < 15 else "tools") for n in range(30)]
    rollouts = collected(tmp_path / "rollouts.jsonl", asked)
    lines = [json.loads(line) for line in rollouts.open()]
    for one in lines[2:6] + lines[34:40]:
        one["response"] |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    write_rows(rollouts, lines)
    benchmark = write_rows(tmp_path / "benchmark.jsonl", asked[:4])
    source = filtered(rollouts, benchmark=[benchmark], agents=["math"], validation=0.0)
    assert leaks_of(tmp_path, [*asked[:4], *asked[15:20]], source) == []
    assert leaks_of(tmp_path, asked[3:5], source) == [(2, "input_key")]
    assert len(leaks_of(tmp_path, asked, rollouts)) == 30


def test_cut_off_rollouts_of_the_training_side_count(tmp_path: Path) -> None:
    asked = [asking(question(n)) for n in range(4)]
    rollouts = collected(tmp_path / "rollouts.jsonl", asked)
    lines = [json.loads(line) for line in rollouts.open()]
    for one in lines[:2]:
        one["response"] |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    source = filtered(write_rows(rollouts, lines), validation=0.0)
    assert leaks_of(tmp_path, asked[:1], source) == [(1, "input_key")]


def test_a_task_that_the_system_prompt_holds_is_told_from_others(tmp_path: Path) -> None:
    def document(n: int) -> dict[str, Any]:
        text = " ".join(f"word{n}x{place}" for place in range(30))
        return asking("Summarise the document in three sentences for a reader in haste.", system=f"Document: {text}")

    source = filtered(collected(tmp_path / "rollouts.jsonl", [document(n) for n in range(30)]), validation=0.3)
    held_out = [json.loads(line) for line in (source / "heldout_inputs.jsonl").open()]
    assert leaks_of(tmp_path, held_out, source) == []
    trained = next(document(n) for n in range(30) if document(n) not in held_out)
    again = trained | {"metadata": {"other": 1}}
    assert leaks_of(tmp_path, [*held_out, again], source) == [(len(held_out) + 1, "text")]


def test_a_question_that_many_system_prompts_precede_is_still_one(tmp_path: Path) -> None:
    asked = [asking(question(n % 5), system=f"You are calculator number {n // 5}.") for n in range(100)]
    source = filtered(collected(tmp_path / "rollouts.jsonl", asked), validation=0.0)
    assert leaks_of(tmp_path, [asking(question(3), system="Think."), asking(question(9))], source) == [(1, "text")]


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ("Please be brief. {}", "Think first. {}"),
        ("{}", "{} Think step by step, then answer."),
        ("Answer with a number. {}", "{}"),
        ("Question: {} Answer:", "{}"),
    ],
)
@pytest.mark.parametrize("ask", [question, lambda n: f"{n} + {3 * n} ="])
def test_a_question_in_other_words_of_the_harness_is_found(
    tmp_path: Path, trained: str, held_out: str, ask: Callable[[int], str]
) -> None:
    source = collected(tmp_path / "rollouts.jsonl", [asking(trained.format(ask(n))) for n in range(10, 40)])
    tasks = [asking(held_out.format(ask(n))) for n in (50, 12, 61, 33)]
    both = "{}" not in (trained, held_out)
    expected = [] if both and ask is not question else [(2, "text"), (4, "text")]
    assert leaks_of(tmp_path, tasks, source) == expected


def test_the_words_around_are_those_of_one_environment(tmp_path: Path) -> None:
    def sides(n: int) -> dict[str, Any]:
        return asking(f"Be brief. {question(n)}") if n % 2 else asking(f"Solve it now. {question(n)}", agent="other")

    source = collected(tmp_path / "rollouts.jsonl", [sides(n) for n in range(20)])
    tasks = [asking(f"Think. {question(n)}", agent="x") for n in (3, 90)]
    tasks += [asking(f"Think hard about it. {question(n)}", agent="y") for n in (4, 91)]
    assert leaks_of(tmp_path, tasks, source) == [(1, "text"), (3, "text")]


def test_a_cluster_file_by_task_key_finds_twins_or_stops(tmp_path: Path) -> None:
    asked = [asking(f"How much are {n} pears and {n + 3} plums?") for n in range(20)]
    twins = [asking(f"How much are {n + 3} plums and {n} pears?") for n in range(20)]
    rollouts, others = (collected(tmp_path / f"{name}.jsonl", rows) for name, rows in (("r", asked), ("o", twins)))
    named: dict[str, dict[str, str]] = {"task_key": {}, "input_key": {}}
    for path in (rollouts, others):
        for line in read_lines([path]):
            assert line.rollout is not None and line.rollout.input_key is not None
            named["task_key"][line.rollout.task_key] = f"c{line.rollout.task_index}"
            named["input_key"][line.rollout.input_key] = f"c{line.rollout.task_index}"
    for key, clusters in named.items():
        file = write_rows(tmp_path / f"{key}.jsonl", [{key: task, "cluster": name} for task, name in clusters.items()])
        source = filtered(rollouts, cluster=str(file), validation=0.0)
        assert leaks_of(tmp_path, twins, source) == [(line, "cluster") for line in range(1, 21)]
        strange = [asking("Which of the two is the taller tree, an oak or a birch, in most years?")]
        if key == "task_key":
            with pytest.raises(UserError, match="nothing tells the cluster of 1 tasks"):
                leaks_of(tmp_path, strange, source)
        else:
            assert leaks_of(tmp_path, strange, source) == []
        # Other tasks may be added, but what the filter was told must stand.
        with file.open("a") as target:
            target.write(json.dumps({"input_key": "0" * 64, "cluster": "c0"}) + "\n")
        assert len(leaks_of(tmp_path, twins, source)) == 20
        rows = [json.loads(line) for line in file.open()]
        write_rows(file, [one | {"cluster": "c"} for one in rows])
        with pytest.raises(UserError, match="other clusters than"):
            leaks_of(tmp_path, twins, source)
        file.unlink()
        with pytest.raises(UserError, match="not there any more"):
            leaks_of(tmp_path, twins, source)


def test_a_row_that_does_not_name_its_cluster_stops(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing tells the cluster of 1 tasks .* line 2"):
        leaks_of(tmp_path, [task(2, 90), task(3, 91) | {"metadata": {}}], folder)
    # A task that the filter has seen is known by its rollouts.
    known = [json.loads(line) for line in (folder / "heldout_inputs.jsonl").open()]
    assert leaks_of(tmp_path, known, folder) == []


def test_clusters_of_a_table_are_known_of_its_tasks_only(tmp_path: Path) -> None:
    asked = [asking(question(n), family=f"f{n % 10}") for n in range(20)]
    rollouts, table = collected(tmp_path / "rollouts.jsonl", asked), tmp_path / "table.parquet"
    write_table([rollouts], table, cluster="family")
    source = filtered(table, validation=0.3)
    held_out = [json.loads(line) for line in (source / "heldout_inputs.jsonl").open()]
    assert leaks_of(tmp_path, held_out, source) == []
    with pytest.raises(UserError, match="nothing tells the cluster"):
        leaks_of(tmp_path, [asking(question(50), family="f3")], source)


def test_a_folder_of_another_verb_has_no_clusters(tmp_path: Path) -> None:
    asked = [asking(question(n)) for n in range(4)]
    rollouts = collected(tmp_path / "rollouts.jsonl", asked)
    with artefact(tmp_path / "collected", verb="collect", settings=CollectSettings(), inputs=[rollouts]) as draft:
        shutil.copy(rollouts, draft.path / "rollouts.jsonl")
    assert leaks_of(tmp_path, [asking(question(2)), asking(question(9))], tmp_path / "collected") == [(1, "text")]


def test_repeats_of_a_task_take_no_further_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = collected(tmp_path / "rollouts.jsonl", [asking(question(n)) for n in range(6)])
    tasks = [asking(question(n), _ng_rollout_index=repeat) for n in (2, 3, 50) for repeat in range(8)]
    reads = []
    monkeypatch.setattr(leaks, "read_rollout", lambda origin: reads.append(origin) or read_rollout(origin))
    assert leaks_of(tmp_path, tasks, source) == [(line, "input_key") for line in range(1, 17)]
    assert len(reads) <= 4 * 6
