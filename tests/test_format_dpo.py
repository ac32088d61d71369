"""Pairs: what the two sides share is in the prompt, and only what the policy wrote carries loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import trl
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from gymtrl import FormatDpoSettings, FormatRewardSettings, FormatSftSettings, format_dpo, format_reward, format_sft
from rows import row, write_rows
from tool_rows import TOOL, cut, recorded, tool_row

COLLECTED = Path(__file__).parent / "data" / "reasoning-gym-8x.jsonl"

TWO_STEPS = [("stone", "SCALES-12"), ("feather", "SCALES-1")]


@pytest.fixture(scope="module")
def tokenizer(smollm2_tools_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_tools_dir)


def made() -> list[dict[str, Any]]:
    return [
        # Two turns alike, then they part.
        tool_row("Weigh both.", TWO_STEPS, "The stone is heavier.", 1.0),
        tool_row("Weigh both.", TWO_STEPS, "They weigh the same.", 0.0, repeat=1),
        # They do the same; the scales show something else.
        tool_row("Weigh it.", [("stone", "SCALES-3")], "It is light.", 1.0, index=1),
        tool_row("Weigh it.", [("stone", "SCALES-99")], "It is heavy.", 0.0, index=1, repeat=1),
        # They part at once.
        tool_row("And this?", [("feather", "SCALES-1")], "Light.", 1.0, index=2),
        tool_row("And this?", [("stone", "SCALES-12")], "Heavy.", 0.0, index=2, repeat=1),
        # No bad one that is whole and measured.
        row("2 + 2 =", "4", 1.0, index=3),
        cut(row("2 + 2 =", "5", 0.0, index=3, repeat=1)),
        row("2 + 2 =", "6", 0.0, index=3, repeat=2, mask_sample=True),
        row("2 + 2 =", "7", None, index=3, repeat=3),
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("made") / "rollouts.jsonl", made())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(next((folder / "data").glob("train-*"))).to_pylist()
    return rows


def why(folder: Path) -> dict[int, str]:
    return {entry["line"]: entry["reason"] for entry in pq.read_table(folder / "dropped.parquet").to_pylist()}


def lines(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(entry["chosen_line"], entry["rejected_line"]) for entry in rows]


def split(entry: dict[str, Any], side: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of a side that carries loss, and the text behind the prompt that does not."""
    marked = list(zip(entry[f"{side}_ids"], entry[f"{side}_mask"], strict=True))
    loss, rest = (tokenizer.decode([i for i, mark in marked if mark == wanted]) for wanted in (1, 0))
    return loss, rest


def test_the_shared_history_is_in_the_prompt_and_each_side_is_one_turn(
    source: Path, tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    result = format_dpo(source, tmp_path / "out", FormatDpoSettings(model=str(smollm2_tools_dir)))
    rows = rows_of(result.path)
    assert lines(rows) == [(1, 2), (5, 6)] and (result.counts.read, result.counts.written) == (10, 4)
    assert why(result.path) == {
        **{3: "diverges_in_environment", 4: "diverges_in_environment", 7: "no_bad_rollout"},
        **{8: "truncated", 9: "masked", 10: "reward_missing"},
    }
    tools = [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    chat = [{"role": "user", "content": "Weigh both."}]
    for thing, shown in TWO_STEPS:
        call = {"type": "function", "function": {"name": "weigh", "arguments": {"x": thing}}}
        chat += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": shown}]
    sent = tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, tokenize=False)
    late, early = rows
    assert (late["depth"], early["depth"], late["kind"]) == (4, 0, "first_divergence")
    assert tokenizer.decode(late["prompt_ids"]) == sent
    assert split(late, "chosen", tokenizer) == ("The stone is heavier.<|im_end|>", "\n")
    assert split(late, "rejected", tokenizer) == ("They weigh the same.<|im_end|>", "\n")
    # Where the first turn is a call, what came of it is on neither side.
    assert "feather" in split(early, "chosen", tokenizer)[0] and "stone" in split(early, "rejected", tokenizer)[0]
    assert "SCALES" not in tokenizer.decode(early["prompt_ids"] + early["chosen_ids"] + early["rejected_ids"])


def test_tool_results_of_trajectories_carry_no_loss(
    source: Path, tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = FormatDpoSettings(model=str(smollm2_tools_dir), kind="trajectory")
    rows = rows_of(format_dpo(source, tmp_path / "out", settings).path)
    assert lines(rows) == [(1, 2), (3, 4), (5, 6)] and {entry["depth"] for entry in rows} == {0}
    for entry in rows:
        assert "SCALES" not in tokenizer.decode(entry["prompt_ids"])
        for side in ("chosen", "rejected"):
            loss, rest = split(entry, side, tokenizer)
            calls = 2 if entry["chosen_line"] == 1 else 1
            assert (loss.count('{"name": "weigh"'), loss.count("<|im_end|>")) == (calls, calls + 1)
            assert "SCALES" not in loss and rest.count("SCALES-") == calls
    assert split(rows[1], "rejected", tokenizer)[0].endswith("It is heavy.<|im_end|>")


def test_reward_rows_are_the_whole_trajectories(source: Path, tmp_path: Path, smollm2_tools_dir: Path) -> None:
    dpo = FormatDpoSettings(model=str(smollm2_tools_dir), kind="trajectory")
    pairs = rows_of(format_dpo(source, tmp_path / "dpo", dpo).path)
    result = format_reward(source, tmp_path / "out", FormatRewardSettings(model=str(smollm2_tools_dir)))
    rows = rows_of(result.path)
    assert lines(rows) == lines(pairs) and {entry["kind"] for entry in rows} == {"trajectory"}
    for entry, pair in zip(rows, pairs, strict=True):
        assert not {"prompt_ids", "chosen_mask", "rejected_mask"} & set(entry)
        for side in ("chosen_ids", "rejected_ids"):
            assert entry[side] == pair["prompt_ids"] + pair[side]


def test_a_pair_is_kept_when_recorded_prompts_differ(
    tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    pair = [
        recorded(tool_row("Weigh it.", TWO_STEPS[:1], answer, reward), tokenizer)
        for answer, reward in (("heavy", 1.0), ("light", 0.0))
    ]
    settings = FormatDpoSettings(model=str(smollm2_tools_dir))
    (entry,) = rows_of(format_dpo(write_rows(tmp_path / "same.jsonl", pair), tmp_path / "same", settings).path)
    assert entry["chosen_route"] == entry["rejected_route"] == "recorded"
    # The same text in other tokens: one word of the question letter by letter.
    word = tokenizer.encode("Weigh", add_special_tokens=False)
    letters = [token for letter in "Weigh" for token in tokenizer.encode(letter, add_special_tokens=False)]
    for item in pair[1]["response"]["output"]:
        if ids := item.get("prompt_token_ids"):
            at = next(i for i in range(len(ids)) if ids[i : i + len(word)] == word)
            item["prompt_token_ids"] = ids[:at] + letters + ids[at + len(word) :]
    (again,) = rows_of(format_dpo(write_rows(tmp_path / "other.jsonl", pair), tmp_path / "other", settings).path)
    assert "recorded" not in (again["chosen_route"], again["rejected_route"])
    assert again["prompt_ids"] == entry["prompt_ids"]


def test_collected_pairs_hold_the_recorded_tokens(tmp_path: Path, smollm2_dir: Path) -> None:
    model = str(smollm2_dir)
    settings = FormatDpoSettings(model=model, reward_threshold=1.0, pairs_per_task=2)
    rows = rows_of(format_dpo(COLLECTED, tmp_path / "out", settings).path)
    sft = format_sft(COLLECTED, tmp_path / "sft", FormatSftSettings(model=model))
    whole = {entry["row_id"]: entry for entry in rows_of(sft.path)}
    assert len(rows) > 8 and len({entry["task_key"] for entry in rows}) == 8
    for entry in rows:
        assert entry["chosen_reward"] == 1.0 > entry["rejected_reward"] + 0.2 - 1e-9
        for side in ("chosen", "rejected"):
            ours = whole[entry[f"{side}_row_id"]]
            assert entry["prompt_ids"] + entry[f"{side}_ids"] == ours["input_ids"]
            labels = [i if mark else -100 for i, mark in zip(entry[f"{side}_ids"], entry[f"{side}_mask"], strict=True)]
            assert [-100] * len(entry["prompt_ids"]) + labels == ours["labels"]


def test_a_side_that_is_too_long_drops_the_pair_but_not_the_partner(tmp_path: Path, smollm2_dir: Path) -> None:
    rows = [row("q", "right", 1.0), row("q", "wrong", 0.2, repeat=1), row("q", "word " * 90, 0.0, repeat=2)]
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    settings = FormatDpoSettings(
        model=str(smollm2_dir), max_length=64, pairs_per_task=2, reward_threshold=1.0, strategy="margin"
    )
    result = format_dpo(source, tmp_path / "out", settings)
    assert lines(rows_of(result.path)) == [(1, 2)] and why(result.path) == {3: "too_long"}
    assert result.longest <= 64


@pytest.mark.parametrize("pairs_per_task", [1, 2])
def test_a_refused_pair_gives_way_to_the_next_best_of_its_task(
    tmp_path: Path, smollm2_tools_dir: Path, pairs_per_task: int
) -> None:
    # The nearest in length to the best are those that did the same, and were shown something else.
    rows = [
        tool_row("Weigh it.", [("stone", "SCALES-3")], "Light.", 1.0),
        tool_row("Weigh it.", [("stone", "SCALES-9")], "Heavy.", 0.0, repeat=1),
        tool_row("Weigh it.", [("stone", "SCALES-8")], "Heavy!", 0.0, repeat=2),
        tool_row("Weigh it.", [("feather", "SCALES-1")], "A feather: very light.", 0.0, repeat=3),
        tool_row("Weigh it.", [("feather", "SCALES-2")], "A feather, that is: light, yes.", 0.0, repeat=4),
        # No pair of these can be used, and none of them is left out for another.
        *(
            tool_row("And this?", [("stone", f"SCALES-{i}")], f"It is {i}.", float(i < 2), index=1, repeat=i)
            for i in range(4)
        ),
    ]
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    settings = FormatDpoSettings(model=str(smollm2_tools_dir), pairs_per_task=pairs_per_task)
    tried: list[None] = []
    result = format_dpo(source, tmp_path / "out", settings, on_row=lambda: tried.append(None))
    environment = "diverges_in_environment"
    expected = dict.fromkeys((2, 3, 6, 7, 8, 9), environment)
    if pairs_per_task == 1:
        assert lines(rows_of(result.path)) == [(1, 4)]
        expected[5] = "not_paired"
        assert len(tried) == 3 + 4
    else:
        assert lines(rows_of(result.path)) == [(1, 4), (1, 5)]
    assert why(result.path) == expected
    assert result.counts.read == len(rows) == result.counts.written + len(expected)


def test_plain_trl_is_offered_only_where_it_gets_the_same_tokens(
    tmp_path: Path, smollm2_tools_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def script(name: str, good: dict[str, Any], bad: dict[str, Any]) -> str:
        source = write_rows(tmp_path / f"{name}.jsonl", [good, bad])
        settings = FormatDpoSettings(model=str(smollm2_tools_dir))
        return (format_dpo(source, tmp_path / name, settings).path / "train_with_trl.py").read_text()

    def asked(made: dict[str, Any]) -> dict[str, Any]:
        said = {"role": "developer", "content": "Answer in words only."}
        made["responses_create_params"]["input"].insert(0, said)
        return made

    def sides() -> tuple[dict[str, Any], dict[str, Any]]:
        return tool_row("Weigh it.", [], "Four.", 1.0), tool_row("Weigh it.", [], "Five.", 0.0)

    assert "DPOTrainer" in script("plain", *sides()) and "TokenDPOTrainer" not in script("plain2", *sides())
    assert "TokenDPOTrainer" in script("developer", *map(asked, sides()))
    assert "TokenDPOTrainer" in script("recorded", *(recorded(side, tokenizer) for side in sides()))


_BARE_THOUGHTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize(
    ("template", "trainer"),
    [("qwen3", " TokenDPOTrainer("), ("qwen2_5", " DPOTrainer("), (_BARE_THOUGHTS, " TokenDPOTrainer(")],
)
def test_plain_trl_is_not_offered_where_it_would_show_what_was_thought(
    tmp_path: Path, smollm2_dir: Path, template: str, trainer: str
) -> None:
    pair = [row("2 + 2 =", answer, reward) for answer, reward in (("4", 1.0), ("5", 0.0))]
    for made in pair:
        thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I count on my fingers."}]}
        made["response"]["output"].insert(0, thought)
    source = write_rows(tmp_path / "rollouts.jsonl", pair)
    own = AutoTokenizer.from_pretrained(smollm2_dir)
    shipped = Path(trl.__file__).parent / "chat_templates"
    own.chat_template = template if "{" in template else (shipped / f"{template}.jinja").read_text()
    own.save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(smollm2_dir).save_pretrained(tmp_path / "model")
    settings = FormatDpoSettings(model=str(tmp_path / "model"), reasoning="drop")
    dataset = format_dpo(source, tmp_path / "dataset", settings).path
    assert "fingers" in rows_of(dataset)[0]["record_json"]
    assert trainer in (dataset / "train_with_trl.py").read_text()
