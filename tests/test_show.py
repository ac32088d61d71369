"""`--show` and `--html`: what carries loss is seen, wrong masks are told, and nothing in a row can act."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gymtrl.errors import UserError
from gymtrl.formats.checks import IGNORED
from gymtrl.formats.painted import TOKENS_APART, PaintedRow, painted_rows
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.formats.totals import dataset_totals
from gymtrl.reports.dataset import print_rows
from gymtrl.reports.dataset_page import write_page

HOSTILE = "</div><script>alert(1)</script>\x1b]0;title\x07 \x1b[2J ⟦fake⟧ [bold]x[/bold] 👩‍🚀 naïve"
TOOL = {"type": "function", "name": "weigh", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """Reads a page; fails where tags do not match."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.loss: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "div" and dict(attrs).get("class") == "tokens":
            self.tokens.append("")
        if tag == "span" and dict(attrs).get("class") == "loss" and self.tokens:
            self.loss.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "i" and self.tokens:
            self.tokens[-1] += data
            loss = [attrs.get("class") for tag, attrs in self.tags if tag == "span"][-1] == "loss"
            if loss:
                self.loss[-1] += data


def answer(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def rollout(question: str, output: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}], "tools": tools or []},
        "response": {"output": output, "status": "completed", "model": "m"},
        "reward": 1.0,
        "agent_ref": {"name": "arithmetic"},
    }


@pytest.fixture(scope="module")
def tokenizer(smollm2_tools_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_tools_dir)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, smollm2_tools_dir: Path) -> Path:
    base = tmp_path_factory.mktemp("show")
    called = [
        {"type": "function_call", "call_id": "c1", "name": "weigh", "arguments": '{"x": 0.5}'},
        {"type": "function_call_output", "call_id": "c1", "output": "quite heavy"},
        answer("It is quite heavy."),
    ]
    rows = [
        rollout("1 + 1 =", [answer("1 + 1 = 2")]),
        rollout("Weigh it.", called, [TOOL]),
        rollout(f"What? {HOSTILE}", [answer(f"This: {HOSTILE}")]),
        {"not": "a rollout"},
    ]
    source = base / "rollouts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return format_sft(source, base / "dataset", FormatSftSettings(model=str(smollm2_tools_dir))).path


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    return folder


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is heavy?<|im_end|>\n<|im_start|>assistant\n"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is heavy?"}]


def side(tokenizer: PreTrainedTokenizerBase, text: str, *, tail: str = "\n") -> tuple[list[int], list[int]]:
    ids, after = encoded(tokenizer, f"{text}<|im_end|>"), encoded(tokenizer, tail)
    return ids + after, [1] * len(ids) + [0] * len(after)


def pair(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    chosen, rejected = side(tokenizer, "Lead is."), side(tokenizer, "Feathers are.")
    record = {
        "prompt": ASKED,
        "chosen": [{"role": "assistant", "content": "Lead is."}],
        "rejected": [{"role": "assistant", "content": "Feathers are."}],
        "tools": [],
    }
    return {
        "task_key": "k" * 64,
        **{f"{name}_file": "r.jsonl" for name in ("chosen", "rejected")},
        **{"chosen_line": 3, "rejected_line": 8, "chosen_reward": 1.0, "rejected_reward": 0.0},
        **{"kind": "first_divergence", "depth": 0, "chosen_route": "template", "rejected_route": "recorded"},
        **{"flags": ["noted"], "record_json": json.dumps(record), "prompt_ids": encoded(tokenizer, PROMPT)},
        **{
            "chosen_ids": chosen[0],
            "chosen_mask": chosen[1],
            "rejected_ids": rejected[0],
            "rejected_mask": rejected[1],
        },
    }


def single(tokenizer: PreTrainedTokenizerBase, **fields: Any) -> dict[str, Any]:
    ids, mask = side(tokenizer, "Lead is.")
    record = {"prompt": ASKED, "completion": [{"role": "assistant", "content": "Lead is."}], "tools": []}
    return {
        **{"file": "r.jsonl", "line": 3, "task_key": "k" * 64, "reward": 1.0, "route": "template", "flags": []},
        **{"record_json": json.dumps(record), "prompt_ids": encoded(tokenizer, PROMPT)},
        **{"completion_ids": ids, "completion_mask": mask},
    } | fields


def printed(rows: list[PaintedRow], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=300, **({"color_system": None} | options))
    print_rows(rows, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def failed(row: PaintedRow) -> str:
    return "; ".join(check.words for side in row.sides for check in side.checks if not check.passed)


def test_rows_of_format_sft_are_painted_and_pass_every_check(dataset: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = list(painted_rows(dataset, tokenizer, 9))
    assert len(rows) == 3 and [failed(row) for row in rows] == ["", "", ""]
    text = printed(rows[:2])
    assert "⟦1 + 1 = 2<|im_end|>⟧" in text and "⟦<|im_start|>" not in text and "✗" not in text
    assert "quite heavy\n</tool_response>" in text and "2 parts with loss for 2 turns" in text
    coloured = printed(rows[:1], force_terminal=True, color_system="standard")
    assert "\x1b[1;30;42m1 + 1 = 2<|im_end|>\x1b[0m" in coloured and "⟦" not in coloured
    assert len(list(painted_rows(dataset, tokenizer, 1))) == 1


def test_pieces_are_the_ids_of_the_dataset_and_whole_characters(
    dataset: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = pq.read_table(dataset / "data" / "train-00000-of-00001.parquet").to_pylist()[2]
    painted = list(painted_rows(dataset, tokenizer, 3))[2].sides[0]
    pieces = [piece for segment in painted.segments for piece in segment.pieces]
    assert [token for piece in pieces for token in piece.ids] == row["input_ids"]
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(row["input_ids"])
    assert not any("\ufffd" in piece.text for piece in pieces) and any(len(piece.ids) > 1 for piece in pieces)
    assert painted.trained == sum(label != IGNORED for label in row["labels"])


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (0, lambda ids, labels: (ids, ids), "a header carries loss"),
        (0, lambda ids, labels: (ids, [IGNORED] * len(ids)), "0 parts with loss for 1 turn"),
        (0, lambda ids, labels: (ids, labels[:-1]), "lengths differ"),
        (0, lambda ids, labels: (ids, [n if n == IGNORED else n + 1 for n in labels]), "neither the token's id"),
        (0, lambda ids, labels: (ids[:-3], labels[:-3]), "cut at the end"),
        (0, lambda ids, labels: (ids[3:], labels[3:]), "cut at the beginning"),
        (0, lambda ids, labels: (ids, [*labels[:-1], ids[-1]]), "which ends no turn"),
        (1, lambda ids, labels: (ids, ids), "the text of a user message carries loss"),
        (1, lambda ids, labels: (ids, only_last(labels)), "not all of the call of 'weigh' in turn 1 carries loss"),
    ],
)
def test_a_wrong_mask_fails_a_check(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, line: int, change: Any, words: str
) -> None:
    row = pq.read_table(dataset / "data" / "train-00000-of-00001.parquet").to_pylist()[line]
    row["input_ids"], row["labels"] = change(row["input_ids"], row["labels"])
    painted = next(painted_rows(write_rows(tmp_path / "d", [row]), tokenizer, 1))
    assert words in failed(painted) and not painted.passed
    assert "✗ " in printed([painted])


def only_last(labels: list[int]) -> list[int]:
    """The labels with all trained parts but the last taken out."""
    end = max(i for i, label in enumerate(labels) if label != IGNORED)
    start = max(i for i in range(end) if labels[i] == IGNORED)
    return [IGNORED] * (start + 1) + labels[start + 1 :]


def test_pairs_show_both_sides(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = pair(tokenizer)
    wrong = row | {"rejected_mask": [0, *row["rejected_mask"][1:]]}
    good, bad = painted_rows(write_rows(tmp_path / "dpo", [row, wrong]), tokenizer, 2)
    text = printed([good])
    assert good.passed and "⟦Lead is.<|im_end|>⟧" in text and "⟦Feathers are.<|im_end|>⟧" in text
    assert "r.jsonl:3 over r.jsonl:8" in text and "first divergence" in text and "rejected · reward 0" in text
    assert failed(bad) == "not all words of turn 1 carry loss"
    assert [s.tokens for s in good.sides] == [len(row["prompt_ids"] + row[f"{n}_ids"]) for n in ("chosen", "rejected")]
    totals = dataset_totals(tmp_path / "dpo")
    assert totals.trained == 2 * sum(row["chosen_mask"]) + 2 * sum(row["rejected_mask"]) - 1
    assert totals.tokens == 2 * sum(s.tokens for s in good.sides) and totals.routes == {"template": 2, "recorded": 2}

    scored = {k: v for k, v in row.items() if not k.endswith("mask") and k != "prompt_ids"}
    scored |= {f"{name}_ids": row["prompt_ids"] + row[f"{name}_ids"][:-1] for name in ("chosen", "rejected")}
    reward = next(painted_rows(write_rows(tmp_path / "reward", [scored]), tokenizer, 1))
    assert reward.objective == "reward" and reward.passed and "Lead is.⟦<|im_end|>⟧" in printed([reward])


def test_kto_and_grpo_rows_are_told_apart_and_checked(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    good = single(tokenizer, label=True)
    bad = single(tokenizer, label=False, completion_mask=[1] * len(good["completion_ids"]))
    rows = list(painted_rows(write_rows(tmp_path / "kto", [good, bad]), tokenizer, 2))
    assert [row.objective for row in rows] == ["kto", "kto"] and rows[0].passed
    assert "label undesirable" in printed(rows) and "ends no turn" in failed(rows[1])

    probabilities = [-0.5] * (len(good["completion_ids"]) - 1)
    group = single(tokenizer, group="g", reward=None, log_probs=[*probabilities, 0.0])
    shifted = single(tokenizer, group="g", log_probs=[0.0, *probabilities])
    rows = list(painted_rows(write_rows(tmp_path / "groups", [group, shifted]), tokenizer, 2))
    assert rows[0].objective == "groups" and rows[0].passed and "failed rollout" in printed(rows)
    assert failed(rows[1]) == "a token without loss has a log-probability"

    online = {name: good[name] for name in ("file", "line", "task_key", "record_json", "prompt_ids")}
    online |= {"pass_rate": 0.25, "rollouts": 4}
    cut = online | {"prompt_ids": online["prompt_ids"][:-2]}
    rows = list(painted_rows(write_rows(tmp_path / "prompts", [online, cut]), tokenizer, 2))
    assert rows[0].objective == "prompts" and rows[0].passed and "0.25 of 4 rollouts" in printed(rows)
    assert failed(rows[1]) == "the header of the answer is missing"


def test_nothing_in_a_row_can_act(dataset: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = list(painted_rows(dataset, tokenizer, 3))
    text = printed(rows)
    assert "title" in text and not {"\x1b", "\x07"} & set(text) and "⟦fake" not in text and "[bold]x[/bold]" in text
    write_page(dataset, rows, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not {"\x1b", "\x07"} & set(source) and "<script" not in source and "script-src" not in source
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "default-src 'none'" in source and "</div><script>alert(1)</script>" in page.tokens[2]


def test_a_long_row_is_whole_with_fewer_pieces_behind_the_limit(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    long = encoded(tokenizer, PROMPT) * 1200
    folder = write_rows(tmp_path / "long", [single(tokenizer, label=True, prompt_ids=long)])
    row = next(painted_rows(folder, tokenizer, 1))
    context, answered = row.sides[0].segments[:2]
    assert (
        context.text == tokenizer.decode(long) and context.tokens == len(long) and answered.text == "Lead is.<|im_end|>"
    )
    assert TOKENS_APART <= len(context.pieces) <= TOKENS_APART + 1
    write_page(folder, [row], tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert f"{len(long):,} tokens without loss" in page.text and page.loss == ["Lead is.<|im_end|>"]


def test_the_page_holds_every_token_and_the_summary(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = list(painted_rows(dataset, tokenizer, 2))
    write_page(dataset, rows, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tokens == ["".join(segment.text for segment in row.sides[0].segments) for row in rows]
    assert page.loss[0] == "1 + 1 = 2<|im_end|>" and len(page.loss) == 3
    totals = dataset_totals(dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())["extra"]
    assert (totals.tokens, totals.trained, totals.longest) == tuple(
        manifest[name] for name in ("tokens", "loss_tokens", "longest")
    )
    words = " ".join(page.text.split())
    assert f"with loss {totals.trained:,} ({totals.share:.1%})" in words and "reject:custom_record" in words
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ("i", {"title": str(end)}) in page.tags


def test_mistakes_are_told(dataset: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train rows"):
        painted_rows(tmp_path, tokenizer, 1)
    row = single(tokenizer, label=True)
    foreign = write_rows(tmp_path / "foreign", [row | {"prompt_ids": [len(tokenizer)]}])
    with pytest.raises(UserError, match="the tokenizer does not have"):
        next(painted_rows(foreign, tokenizer, 1))
    with pytest.raises(UserError, match="no token ids"):
        painted_rows(write_rows(tmp_path / "other", [{"a": 1}]), tokenizer, 1)
    with pytest.raises(UserError, match="would be overwritten"):
        write_page(dataset, [], dataset / "README.md")
