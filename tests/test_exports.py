"""`export`: every row is written as the other trainer documents its format, or dropped with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from gymtrl.errors import UserError
from gymtrl.exports import nemo_rl, openai, tokens
from gymtrl.exports.export import export_dataset
from gymtrl.exports.settings import ExportSettings
from gymtrl.exports.source import Chat, Dropped
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.workspace.artefact import artefact, read_manifest
from rows import row, write_rows

PAGE = Path(__file__).parent.parent / "docs" / "export.md"

NEMO_RL, OPENAI, TOKENS = (ExportSettings(to=to) for to in ("nemo-rl", "openai", "tokens"))  # type: ignore[arg-type]
USER = {"role": "user", "content": "How heavy? ≥ 1 kg"}
SAID = {"role": "assistant", "content": "Heavy."}
ARGUMENTS = {"x": 0.7390571438903143, "tiny": 1e-12, "none": None, "nested": {"a": [1, None]}, "ü": "é"}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"x": {"type": "number", "default": None}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def asked(*before: dict[str, Any], answer: str = "Heavy.") -> dict[str, Any]:
    made = row("", answer, 1.0)
    made["responses_create_params"]["input"] = [*before, USER]
    return made


def tool_row(name: str, *, ends: bool = True) -> dict[str, Any]:
    made = asked()
    made["responses_create_params"]["tools"] = [{"type": "function", **tool(name)["function"]}]
    made["response"]["output"] = [
        {"type": "function_call", "call_id": "c1", "name": name, "arguments": json.dumps(ARGUMENTS)},
        {"type": "function_call_output", "call_id": "c1", "output": "heavy"},
        *(made["response"]["output"] if ends else []),
    ]
    return made


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, smollm2_tools_dir: Path) -> Path:
    """Lines: 1 plain, 2 tool, 3 with history, 4 developer, 5 a tool's name with a dot, 6 ends in a tool's answer."""
    base = tmp_path_factory.mktemp("sft")
    developer = {"role": "developer", "content": "Be brief."}
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [
        asked(),
        tool_row("weigh"),
        asked(*history),
        asked(developer, answer="Very."),
        tool_row("scale.weigh"),
        tool_row("weigh", ends=False),
    ]
    write_rows(base / "filtered" / "train.jsonl", lines)
    write_rows(base / "filtered" / "validation.jsonl", [asked(answer="Held out.")])
    return format_sft(base / "filtered", base / "dataset", FormatSftSettings(model=str(smollm2_tools_dir))).path


class Made(BaseModel):
    """The setting of the format verbs that an export must know."""

    reasoning: str


def dataset(
    path: Path, verb: str, columns: dict[str, Any], rows: list[dict[str, Any]], reasoning: str = "keep"
) -> Path:
    """A dataset folder of an objective, written by hand."""
    with artefact(path, verb=verb, settings=Made(reasoning=reasoning), inputs=[]) as draft:
        (draft.path / "data").mkdir()
        table = pa.Table.from_pylist(rows, schema=pa.schema(columns))
        pq.write_table(table, draft.path / "data" / "train-00000-of-00001.parquet")
    return path


TEXT, IDS, MASK = pa.string(), pa.list_(pa.int32()), pa.list_(pa.int8())
KEYS = {"task_key": TEXT, "input_key": TEXT, "cluster_key": TEXT}
IDENTITY = {"row_id": TEXT, "file": TEXT, "line": pa.int64(), **KEYS, "reward": pa.float64()}
COMPLETION = {"record_json": TEXT, "prompt_ids": IDS, "completion_ids": IDS, "completion_mask": MASK}
SIDES = ("chosen", "rejected")
PAIR = (
    KEYS
    | {f"{s}_{n}": t for s in SIDES for n, t in [("row_id", TEXT), ("file", TEXT), ("line", pa.int64())]}
    | {f"{s}_reward": pa.float64() for s in SIDES}
    | {"kind": TEXT, "depth": pa.int32(), "record_json": TEXT, "prompt_ids": IDS}
    | {f"{s}_{n}": t for s in SIDES for n, t in [("ids", IDS), ("mask", MASK)]}
)


def pair(line: int, prompt: list[Any], chosen: list[Any], rejected: list[Any], tools: Any = ()) -> dict[str, Any]:
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": list(tools)}
    made: dict[str, Any] = {"task_key": f"t{line}", "input_key": None, "cluster_key": "c", "kind": "trajectory"}
    for place, side in enumerate(SIDES):
        made |= {f"{side}_row_id": f"{side}{line}", f"{side}_file": "r.jsonl", f"{side}_line": 10 * line + place}
        made |= {f"{side}_reward": 1.0 - place, f"{side}_ids": [7 + place, 9], f"{side}_mask": [1, place]}
    return made | {"depth": 0, "record_json": json.dumps(record), "prompt_ids": [1, 2, 3]}


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs: 1 plain, 2 with history, 3 with several messages, 4 with a tool."""
    function = {"name": "weigh", "arguments": ARGUMENTS}
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    answer = {"role": "tool", "content": "heavy", "tool_call_id": "c", "name": "weigh"}
    rows = [
        pair(1, [USER], [said("Heavy.")], [said("Light.")]),
        pair(2, [USER, said("Why?"), USER], [said("Heavy.")], [said("Light.")]),
        pair(3, [USER], [said("Wait."), USER, said("Heavy.")], [said("Light.")]),
        pair(4, [USER, call, answer], [said("Heavy.")], [call], [tool("weigh")]),
    ]
    return dataset(tmp_path_factory.mktemp("dpo") / "dataset", "format dpo", PAIR, rows)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reasons(folder: Path, line: str = "line") -> dict[int, str]:
    """What was dropped, after checking that no row went without a verdict."""
    counts = read_manifest(folder).counts
    dropped = lines_of(folder / "dropped.jsonl")
    assert counts is not None and counts.read == counts.written + len(dropped)
    assert all(entry["detail"] and entry["split"] == "train" for entry in dropped)
    return {entry[line]: entry["reason"] for entry in dropped}


def nemo_row(chat: Chat) -> dict[str, Any] | Dropped:
    return nemo_rl.sft_row(chat, "every")


def nemo_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Reads a row of NeMo RL's OpenAI format as documented, with the assistant messages that it trains marked."""
    assert row["messages"][-1]["role"] == "assistant"
    for message in row["messages"]:
        assert message["role"] in ("system", "user", "assistant", "tool") and isinstance(message["content"], str)
        for called in message.get("tool_calls", ()):
            assert called["type"] == "function" and called["id"] and isinstance(called["function"]["arguments"], dict)
    assert all(isinstance(declared["function"]["name"], str) for declared in row.get("tools", ()))
    return [message | {"trained": message["role"] == "assistant"} for message in row["messages"]]


def nemo_pair(row: dict[str, Any]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Reads a row of NeMo RL's preference format as documented: the context, and the better and the worse message."""
    assert len(row["completions"]) == 2
    better, worse = sorted(row["completions"], key=lambda completion: completion["rank"])
    assert better["rank"] != worse["rank"] and better["reward"] > worse["reward"]
    for completion in (better, worse):
        assert [set(message) for message in completion["completion"]] == [{"role", "content"}]
        assert completion["completion"][0]["role"] == "assistant"
    return row["context"], better["completion"][0], worse["completion"][0]


def check_openai_message(message: dict[str, Any], *, weights: bool) -> None:
    """Checks a message against the schema of OpenAI's API description: its keys by role, and their types."""
    role = message["role"]
    more = {"assistant": {"tool_calls", *({"weight"} if weights else ())}, "tool": {"tool_call_id"}}
    assert role in ("system", "user", "assistant", "tool")
    assert set(message) <= {"role", "content", *more.get(role, ())}
    assert isinstance(message["content"], str) if "content" in message else message["tool_calls"]
    assert role != "tool" or isinstance(message["tool_call_id"], str)
    assert message.get("weight", 1) in (0, 1)
    for called in message.get("tool_calls", ()):
        assert set(called) == {"id", "type", "function"} and set(called["function"]) == {"name", "arguments"}
        assert isinstance(json.loads(called["function"]["arguments"]), dict)


def check_openai_tools(row: dict[str, Any]) -> None:
    assert ("tools" in row) == ("parallel_tool_calls" in row)
    for declared in row.get("tools", ()):
        assert set(declared) == {"type", "function"} and declared["type"] == "function"
        assert set(declared["function"]) <= {"name", "description", "parameters", "strict"}
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", declared["function"]["name"])


def test_nemo_rl_trains_what_the_dataset_trains(sft: Path, tmp_path: Path, smollm2_tools_dir: Path) -> None:
    from transformers import AutoTokenizer

    folder = export_dataset(sft, tmp_path / "out", NEMO_RL).path
    assert reasons(folder) == {3: "history_would_be_trained"}
    stored = {
        entry["line"]: entry for entry in pq.read_table(sft / "data" / "train-00000-of-00001.parquet").to_pylist()
    }
    tokenizer = AutoTokenizer.from_pretrained(smollm2_tools_dir)
    exported = lines_of(folder / "train.jsonl")
    assert [entry["metadata"]["line"] for entry in exported] == [1, 2, 4, 5, 6]
    for entry in exported:
        of = stored[entry["metadata"]["line"]]
        record = json.loads(of["record_json"])
        messages = nemo_messages(entry)
        assert [m["content"] for m in messages if m["trained"]] == [
            m["content"] for m in record["completion"] if m["role"] == "assistant"
        ]
        assert {"row_id", "file", "task_key", "cluster_key", "reward"} <= entry["metadata"].keys()
        assert entry["metadata"]["row_id"] == of["row_id"] and entry["metadata"]["task_key"] == of["task_key"]
        # NeMo RL renders with the same template, so it must come to the tokens that were checked.
        rendered = tokenizer.apply_chat_template(entry["messages"], tools=entry.get("tools"), tokenize=False)
        rendered_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert rendered_ids == of["input_ids"][: len(rendered_ids)]
        assert all(label == -100 for label in of["labels"][len(rendered_ids) :])
    assert exported[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    assert exported[1]["tools"] == [tool("weigh")] and "tools" not in exported[0]
    assert exported[2]["messages"][0]["role"] == "system"
    assert exported[4]["messages"][-1]["tool_calls"]
    extra = read_manifest(folder).extra
    assert "only_unmask_final" not in extra["trained_messages"]
    assert (extra["developer_as_system"], extra["untrained_end_left_out"]) == (1, 1)
    assert [entry["messages"][-1]["content"] for entry in lines_of(folder / "validation.jsonl")] == ["Held out."]


def test_nemo_rl_trains_the_last_message_where_that_holds_more(tmp_path: Path) -> None:
    def chat(prompt: list[Any], completion: list[Any]) -> str:
        return json.dumps({"prompt": prompt, "completion": completion, "tools": []})

    few_shot = chat([USER, said("1"), USER], [SAID])
    several = chat([USER], [SAID, USER, SAID])
    rows = [one(line, record_json=record) for line, record in enumerate([few_shot, few_shot, several], start=1)]
    source = dataset(tmp_path / "sft", "format sft", IDENTITY | COMPLETION, rows)
    folder = export_dataset(source, tmp_path / "out", NEMO_RL).path
    assert "sft.only_unmask_final=true" in read_manifest(folder).extra["trained_messages"]
    assert reasons(folder) == {3: "earlier_messages_untrained"}
    assert [entry["messages"][-1] for entry in lines_of(folder / "train.jsonl")] == [SAID, SAID]


def test_nemo_rl_takes_pairs_of_single_messages_without_tools(dpo: Path, tmp_path: Path) -> None:
    folder = export_dataset(dpo, tmp_path / "out", NEMO_RL).path
    assert reasons(folder, "chosen_line") == {30: "more_than_one_message", 40: "tools"}
    exported = lines_of(folder / "train.jsonl")
    for entry in exported:
        context, better, worse = nemo_pair(entry)
        assert context[-1] == USER and (better["content"], worse["content"]) == ("Heavy.", "Light.")
    assert [len(entry["context"]) for entry in exported] == [1, 3]
    assert (exported[1]["metadata"]["task_key"], exported[1]["metadata"]["rejected_line"]) == ("t2", 21)


def test_openai_rows_fit_the_schema_and_train_the_completion_only(sft: Path, tmp_path: Path) -> None:
    folder = export_dataset(sft, tmp_path / "out", OPENAI).path
    assert reasons(folder) == {5: "tool_name"}
    exported = lines_of(folder / "train.jsonl")
    for entry in exported:
        assert set(entry) <= {"messages", "tools", "parallel_tool_calls"}
        check_openai_tools(entry)
        for message in entry["messages"]:
            check_openai_message(message, weights=True)
        assert entry["messages"][-1]["role"] == "assistant"
    plain, with_tool, with_history, developer, unanswered = exported
    assert plain == {"messages": [USER, SAID]}
    call = with_tool["messages"][1]
    assert "content" not in call
    assert call["tool_calls"][0]["function"]["arguments"] == json.dumps(ARGUMENTS, ensure_ascii=False)
    assert [m.get("weight", 1) for m in with_history["messages"] if m["role"] == "assistant"] == [0, 1]
    assert developer["messages"][0] == {"role": "system", "content": "Be brief."}
    assert unanswered["messages"] == [USER, call]
    beside = lines_of(folder / "train_provenance.jsonl")
    assert [entry["line"] for entry in beside] == [1, 2, 3, 4, 6] and all(entry["task_key"] for entry in beside)


def test_openai_pairs_fit_the_schema(dpo: Path, tmp_path: Path) -> None:
    folder = export_dataset(dpo, tmp_path / "out", OPENAI).path
    assert reasons(folder, "chosen_line") == {30: "more_than_one_message"}
    exported = lines_of(folder / "train.jsonl")
    for entry in exported:
        assert set(entry) == {"input", "preferred_output", "non_preferred_output"}
        assert set(entry["input"]) <= {"messages", "tools", "parallel_tool_calls"}
        check_openai_tools(entry["input"])
        for message in (*entry["input"]["messages"], *entry["preferred_output"], *entry["non_preferred_output"]):
            check_openai_message(message, weights=False)
        assert [m["role"] for m in entry["preferred_output"] + entry["non_preferred_output"]] == ["assistant"] * 2
        assert entry["preferred_output"] == [said("Heavy.")]
    assert exported[2]["non_preferred_output"][0]["tool_calls"] and len(exported[1]["input"]["messages"]) == 3
    beside = lines_of(folder / "train_provenance.jsonl")
    assert [entry["chosen_row_id"] for entry in beside] == ["chosen1", "chosen2", "chosen4"]


@pytest.mark.parametrize(
    ("message", "convert", "reason"),
    [
        (SAID | {"reasoning_content": "hm"}, openai.sft_row, "reasoning"),
        (SAID | {"reasoning_content": "hm"}, nemo_row, None),
        (SAID | {"content": [{"type": "image"}]}, openai.sft_row, "images"),
        (SAID | {"content": [{"type": "image"}]}, nemo_row, "images"),
    ],
)
def test_what_a_format_has_no_place_for_is_dropped(
    message: dict[str, Any], convert: Callable[[Chat], dict[str, Any] | Dropped], reason: str | None
) -> None:
    made = convert(Chat([USER], [message], [], {}))
    assert (made.reason if isinstance(made, Dropped) else None) == reason
    assert isinstance(made, Dropped) or made["messages"][-1] == message


def test_reasoning_that_the_dataset_left_out_stays_out(tmp_path: Path) -> None:
    rows = [pair(1, [USER], [said("Heavy.") | {"reasoning_content": "hm"}], [said("Light.")])]
    kept = dataset(tmp_path / "kept", "format dpo", PAIR, rows)
    left_out = dataset(tmp_path / "left_out", "format dpo", PAIR, rows, reasoning="drop")
    for settings, side in [(NEMO_RL, "completions"), (OPENAI, "preferred_output")]:
        folder = export_dataset(left_out, tmp_path / f"without-{side}", settings).path
        assert "hm" not in json.dumps(lines_of(folder / "train.jsonl")[0][side])
    (entry,) = lines_of(export_dataset(kept, tmp_path / "with", NEMO_RL).path / "train.jsonl")
    assert entry["completions"][0]["completion"][0]["reasoning_content"] == "hm"
    with pytest.raises(UserError, match="1 reasoning"):
        export_dataset(kept, tmp_path / "out", OPENAI)


def test_tokens_of_sft_are_those_of_the_dataset(sft: Path, tmp_path: Path) -> None:
    result = export_dataset(sft, tmp_path / "out", TOKENS)
    assert result.rows == {"train": 6, "validation": 1} and not result.counts.dropped
    exported = pq.read_table(result.path / "data" / "train-00000.parquet").to_pylist()
    stored = pq.read_table(sft / "data" / "train-00000-of-00001.parquet").to_pylist()
    for entry, of in zip(exported, stored, strict=True):
        assert entry["input_ids"] == of["input_ids"]
        assert entry["loss_mask"] == [int(label != -100) for label in of["labels"]] and 1 in entry["loss_mask"]
        names = ("row_id", "file", "line", "task_key", "input_key", "cluster_key", "reward")
        assert all(entry[name] == of[name] for name in names)


def test_tokens_of_a_pair_are_two_rows(dpo: Path, tmp_path: Path) -> None:
    result = export_dataset(dpo, tmp_path / "out", TOKENS)
    assert (result.counts.read, result.counts.written, result.rows) == (4, 4, {"train": 8})
    chosen, rejected = pq.read_table(result.path / "data" / "train-00000.parquet").to_pylist()[2:4]
    assert (chosen["pair"], chosen["side"], rejected["pair"], rejected["side"]) == (1, "chosen", 1, "rejected")
    assert (chosen["input_ids"], chosen["loss_mask"]) == ([1, 2, 3, 7, 9], [0, 0, 0, 1, 0])
    assert (rejected["input_ids"], rejected["loss_mask"]) == ([1, 2, 3, 8, 9], [0, 0, 0, 1, 1])
    assert (rejected["row_id"], rejected["line"], rejected["reward"], rejected["task_key"]) == (
        "rejected2",
        21,
        0.0,
        "t2",
    )


def one(line: int, **more: Any) -> dict[str, Any]:
    made = {"row_id": f"r{line}", "file": "r.jsonl", "line": line, "task_key": "t", "cluster_key": "c", "reward": 1.0}
    record = json.dumps({"prompt": [USER], "completion": [SAID], "tools": []})
    tokens = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "completion_mask": [1, 0]}
    return made | {"record_json": record} | tokens | more


def test_tokens_of_groups_keep_log_probabilities_in_place(tmp_path: Path) -> None:
    columns = IDENTITY | COMPLETION | {"group": TEXT, "log_probs": pa.list_(pa.float64())}
    rows = [one(1, group="g", log_probs=[-0.5, 0.0]), one(2, group="g"), one(3, group="g", reward=None)]
    source = dataset(tmp_path / "grpo", "format grpo", columns, rows)
    folder = export_dataset(source, tmp_path / "out", TOKENS).path
    first, second, spoiled = pq.read_table(folder / "data" / "train-00000.parquet").to_pylist()
    assert (first["input_ids"], first["loss_mask"]) == ([1, 2, 3, 4], [0, 0, 1, 0])
    assert (first["log_probs"], second["log_probs"], first["group"]) == ([0.0, 0.0, -0.5, 0.0], None, "g")
    assert spoiled["reward"] is None and spoiled["input_ids"] == [1, 2, 3, 4]


def test_tokens_of_kto_keep_the_label_and_no_chat_format_takes_it(tmp_path: Path) -> None:
    columns = IDENTITY | COMPLETION | {"label": pa.bool_()}
    source = dataset(tmp_path / "kto", "format kto", columns, [one(1, label=True), one(2, label=False)])
    folder = export_dataset(source, tmp_path / "out", TOKENS).path
    assert [entry["label"] for entry in pq.read_table(folder / "data").to_pylist()] == [True, False]
    with pytest.raises(UserError, match="openai has no format for") as caught:
        export_dataset(source, tmp_path / "chat", OPENAI)
    assert "--to tokens" in (caught.value.remedy or "")


def test_shards_take_rows_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_ROWS_A_SHARD", 300)
    with tokens.Shards(tmp_path, "train", pa.schema({"pair": pa.int64()})) as shards:
        for number in range(700):
            shards.write([{"pair": number}])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["train-00000.parquet", "train-00001.parquet"]
    assert [entry["pair"] for name in files for entry in pq.read_table(tmp_path / name).to_pylist()] == list(range(700))


def test_mistakes_are_told_with_a_remedy(sft: Path, tmp_path: Path) -> None:
    whole = {name: kind for name, kind in PAIR.items() if not name.endswith("_mask") and name != "prompt_ids"}
    rewards = dataset(tmp_path / "reward", "format reward", whole, [pair(1, [USER], [SAID], [said("Light.")])])
    assert export_dataset(rewards, tmp_path / "pairs", NEMO_RL).counts.written == 1
    prompts = dataset(tmp_path / "grpo", "format grpo", {"task_key": TEXT, "prompt_ids": IDS}, [{"task_key": "t"}])
    several = dataset(tmp_path / "dpo", "format dpo", PAIR, [pair(1, [USER], [SAID, USER, SAID], [SAID])])
    exported = export_dataset(sft, tmp_path / "export", TOKENS).path
    for source, settings, message in [
        (rewards, TOKENS, "no loss mask"),
        (prompts, TOKENS, "no completions"),
        (several, OPENAI, "no training row is left of 1: 1 more_than_one_message"),
        (exported, OPENAI, "is no dataset: 'export' wrote it"),
        (tmp_path, OPENAI, "not a folder that gymtrl wrote"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            export_dataset(source, tmp_path / "out", settings)
        assert caught.value.remedy and not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, gymtrl.cli.main as m\n"
        "try: m.app(['export', '--help'])\n"
        "finally: print([n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'polars') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Usage:" in done.stdout and done.stdout.rstrip().endswith("[]"), done.stdout[-200:]


def test_commands_of_the_page_run_and_show_what_it_says(
    gym_site_packages: Path, smollm2_tools_dir: Path, tmp_path: Path
) -> None:
    blocks = re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE.read_text(), flags=re.DOTALL)
    env = os.environ | {
        "SITE": str(gym_site_packages),
        "MODEL": str(smollm2_tools_dir),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "112",
    }
    assert blocks
    for commands, shown in blocks:
        done = subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [line.rstrip() for line in done.stdout.splitlines()] == shown.splitlines(), commands
