"""What TRL 1.16 trains when it is given rollouts as they are, and what it trains on gymtrl's datasets, token by token.

Run as: python examples/silent_failures.py [1|2|3|4] [--model FOLDER] [--svg FOLDER]

Nothing is trained here: each row is what the trainer's own preparation and collator hand to its loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import pyarrow.parquet as pq
import torch
import transformers
import trl
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import gymtrl
from gymtrl.errors import UserError
from gymtrl.formats.checks import IGNORED
from gymtrl.formats.painted import PaintedRow, Piece, Segment, Side, painted_rows
from gymtrl.formats.painted_checks import Decoder, check_side
from gymtrl.formats.templates import model_template
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.reports.dataset import print_rows

Row = dict[str, Any]
Tokens = tuple[list[int], list[bool]]  # ids, and which of them carry loss
Benches = Callable[[str], "Bench"]  # by the name of a chat template

DEFAULT = "False, the default"
SHOWN = 420  # characters of a stretch without loss; the middle of longer ones is left out


@dataclass(frozen=True)
class Exhibit:
    """One failure: the rows that TRL makes of rollouts, and those that gymtrl makes of the same."""

    name: str
    words: str
    rows: tuple[PaintedRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """A random model of two layers, with a real tokenizer and one of the chat templates that TRL ships."""

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def written(self, rows: Sequence[Row]) -> Path:
        path = self.folder / "rollouts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def config(self) -> dict[str, Any]:
        """What a small machine without network needs; all else is TRL's default."""
        return {"output_dir": str(self.folder / "trl"), "report_to": "none", "use_cpu": True, "bf16": False}

    def trainer(self, kind: Any, args: Any, rows: list[Row]) -> Any:
        dataset = datasets.Dataset.from_list(rows)
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model)
        return kind(model=model, args=args, train_dataset=dataset, processing_class=self.tokenizer())


def bench(base: Path, tokenizer_of: str, template: str) -> Bench:
    """Makes the bench of a template."""
    made = Bench(base / template)
    if made.folder.exists():
        return made
    tokenizer = load_tokenizer(tokenizer_of)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    tokenizer.save_pretrained(made.model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(made.model)
    return made


def message(role: str, text: str, **more: Any) -> Row:
    return {"role": role, "content": text, **more}


system, user, said = (partial(message, role) for role in ("system", "user", "assistant"))


def called(name: str, arguments: Any) -> Row:
    return said("", tool_calls=[{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}])


def result(text: str) -> Row:
    return message("tool", text, tool_call_id="c1")


def tool(name: str, **kinds: str) -> Row:
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in kinds.items()}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def rollout(*messages: Row, tools: Sequence[Row] = (), reward: float = 1.0) -> Row:
    return {"messages": list(messages), "tools": list(tools), "reward": reward}


def plain(row: Row) -> Row:
    """The row for TRL: what was asked, and all that followed."""
    first = [turn["role"] for turn in row["messages"]].index("assistant")
    tools = {"tools": row["tools"]} if row["tools"] else {}
    return {"prompt": row["messages"][:first], "completion": row["messages"][first:], **tools}


def weighing(asked: int, answer: str, shown: str, reward: float) -> Row:
    return rollout(
        system("You run the scales."),
        user("What does parcel 7 weigh?"),
        called("weigh", {"parcel": asked}),
        result(shown),
        said(answer),
        tools=[tool("weigh", parcel="integer")],
        reward=reward,
    )


GOOD = weighing(7, "Parcel 7 weighs 2.4 kg.", "2.4 kg; label torn", 1.0)
BAD = weighing(1, "Parcel 7 weighs 31 kg.", "31 kg; two straps", 0.0)


def trl_sft(place: Bench, rows: list[Row], **options: Any) -> list[Tokens]:
    trainer = place.trainer(SFTTrainer, SFTConfig(**place.config(), **options), [plain(row) for row in rows])
    batches = (trainer.data_collator([row]) for row in trainer.train_dataset)
    return [(batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORED).tolist()) for batch in batches]


def trl_dpo(place: Bench, chosen: Row, rejected: Row) -> list[Tokens]:
    pair = plain(chosen)
    pair |= {"chosen": pair.pop("completion"), "rejected": plain(rejected)["completion"]}
    trainer = place.trainer(DPOTrainer, DPOConfig(**place.config()), [pair])
    return _masked(trainer.data_collator([trainer.train_dataset[0]]))


def trl_kto(place: Bench, rows: list[Row]) -> list[Tokens]:
    labelled = [{**plain(row), "label": row["reward"] > 0.5} for row in rows]
    config = KTOConfig(**place.config(), per_device_train_batch_size=len(rows))
    trainer = place.trainer(KTOTrainer, config, labelled)
    return _masked(trainer.data_collator(list(trainer.train_dataset)))


def _masked(batch: dict[str, Any]) -> list[Tokens]:
    found = []
    for ids, real, mask in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        length = int(real.sum())
        found.append((ids[:length].tolist(), (mask[:length] == 1).tolist()))
    return found


def trl_row(place: Bench, title: str, rollouts: Sequence[Row], tokens: Sequence[Tokens], **facts: Any) -> PaintedRow:
    """TRL's rows as gymtrl shows its own, with the same checks."""
    decoder = Decoder(model_template(place.tokenizer()))
    names = ("chosen", "rejected") if len(tokens) == 2 else ("",)
    sides = []
    for name, row, (ids, trained) in zip(names, rollouts, tokens, strict=True):
        segments, start = [], 0
        for loss, group in groupby(trained):
            stop = start + len(list(group))
            segments.append(Segment((Piece(decoder.text(ids[start:stop]), tuple(ids[start:stop])),), loss))
            start = stop
        parts = plain(row)
        checks = check_side(ids, trained, parts["prompt"], parts["completion"], decoder)
        sides.append(Side(name, (), tuple(segments), len(ids), sum(trained), checks))
    told = tuple((name, str(value)) for name, value in facts.items())
    return PaintedRow("dpo" if len(sides) == 2 else "sft", f"TRL: {title}", told, (), tuple(sides))


def ours(place: Bench, verb: str, rows: Sequence[Row], **options: Any) -> list[PaintedRow]:
    """The rows that a format verb writes."""
    write, settings = {
        "sft": (gymtrl.format_sft, gymtrl.FormatSftSettings),
        "dpo": (gymtrl.format_dpo, gymtrl.FormatDpoSettings),
        "kto": (gymtrl.format_kto, gymtrl.FormatKtoSettings),
    }[verb]
    with TemporaryDirectory(dir=place.folder) as base:
        out = write(place.written(rows), Path(base) / "dataset", settings(model=place.model, **options)).path
        found = list(painted_rows(out, place.tokenizer(), len(rows) * 2))
        lost = pq.read_table(out / "dropped.parquet").to_pylist() if (out / "dropped.parquet").exists() else []
    flags = tuple(f"line {entry['line']} dropped: {entry['reason']}, {entry['detail']}" for entry in lost)
    return [dataclasses.replace(row, title=f"gymtrl format {verb}", flags=(*row.flags, *flags)) for row in found]


def tool_results(benches: Benches) -> Iterator[Exhibit]:
    place = benches("qwen2_5")
    yield Exhibit(
        "1-sft",
        "SFTTrainer, prompt and completion, all defaults: the result of the tool is trained",
        (
            trl_row(place, "SFTTrainer", [GOOD], trl_sft(place, [GOOD]), assistant_only_loss=DEFAULT),
            *ours(place, "sft", [GOOD]),
        ),
    )
    yield Exhibit(
        "1-dpo",
        "DPOTrainer: it has no switch for this; the results of both sides are scored",
        (
            trl_row(place, "DPOTrainer", [GOOD, BAD], trl_dpo(place, GOOD, BAD)),
            *ours(place, "dpo", [GOOD, BAD], kind="trajectory"),
        ),
    )
    good = trl_kto(place, [GOOD, BAD])[:1]
    desirable = [row for row in ours(place, "kto", [GOOD, BAD]) if ("label", "desirable") in row.facts]
    yield Exhibit(
        "1-kto",
        "KTOTrainer: neither has it; the good rollout of two is shown",
        (trl_row(place, "KTOTrainer", [GOOD], good, label="desirable"), *desirable),
    )


def null_keys(benches: Benches) -> Iterator[Exhibit]:
    place = benches("qwen2_5")
    tools = [tool("weigh", parcel="integer"), tool("send", city="string", express="boolean")]
    post = partial(rollout, system("You run the post."), tools=tools)
    weigh = post(user("Weigh parcel 7."), called("weigh", {"parcel": 7}), result("2.4 kg"), said("It weighs 2.4 kg."))
    send = post(user("Send it."), called("send", {"city": "Oslo", "express": True}), result("sent"), said("Sent."))
    tokens = trl_sft(place, [weigh, send], assistant_only_loss=True)[:1]
    yield Exhibit(
        "2-null-keys",
        "Dataset.from_list gives every call the arguments of all others, with null; the first rollout of two",
        (
            trl_row(place, "SFTTrainer", [weigh], tokens, assistant_only_loss=True),
            *ours(place, "sft", [weigh, send])[:1],
        ),
    )


def cut_answer(benches: Benches) -> Iterator[Exhibit]:
    place = benches("qwen2_5")
    scans = "".join(f"crate {n}: {n * 7 % 40} kg, bay {n % 6}\n" for n in range(100, 190))
    long = rollout(
        system("You run the scales."),
        user("Which crates are the heaviest?"),
        called("scan", {"hall": 2}),
        result(scans),
        said("Crates 137 and 177 are the heaviest, with 39 kg each."),
        tools=[tool("scan", hall="integer")],
    )
    tokens = trl_sft(place, [long], assistant_only_loss=True)
    whole = ours(place, "sft", [long])
    with_limit = ours(place, "sft", [long, GOOD], max_length=1024)
    yield Exhibit(
        "3-cut",
        "max_length=1024, TRL's default, keeps the start of a row; the answer and its end are gone",
        (
            trl_row(place, "SFTTrainer", [long], tokens, assistant_only_loss=True, max_length="1024, the default"),
            *whole,
        ),
        tuple(f"gymtrl format sft --max-length 1024: {flag}" for flag in with_limit[0].flags),
    )


def templates(benches: Benches) -> Iterator[Exhibit]:
    thinking = rollout(
        user("3 parcels of 4 kg?"),
        said("12 kg.", reasoning_content="Three times four is twelve."),
        user("And one more of 5 kg?"),
        said("17 kg.", reasoning_content="Twelve and five is seventeen."),
    )
    place, only = benches("qwen3"), {"assistant_only_loss": True}
    yield Exhibit(
        "4-reasoning",
        "Qwen3's template drops the reasoning of all but the last query; the one that TRL trains with keeps it, also "
        "where a server would not",
        (
            trl_row(place, "SFTTrainer", [thinking], trl_sft(place, [thinking]), assistant_only_loss=DEFAULT),
            trl_row(place, "SFTTrainer", [thinking], trl_sft(place, [thinking], **only), **only),
            *ours(place, "sft", [thinking]),
        ),
    )
    told = message("developer", "Give weights in pounds.")
    developed = rollout(told, user("Parcel 7?"), said("5.3 pounds."))
    place = benches("qwen2_5")
    yield Exhibit(
        "4-developer",
        "Qwen2.5's template has no place for the developer's message and says something else instead",
        (
            trl_row(place, "SFTTrainer", [developed], trl_sft(place, [developed], **only), **only),
            *ours(place, "sft", [developed]),
        ),
    )
    stringed = rollout(
        system("You run the scales."),
        user("Weigh parcel 7."),
        called("weigh", json.dumps({"parcel": 7})),
        result("2.4 kg"),
        said("It weighs 2.4 kg."),
        tools=[tool("weigh", parcel="integer")],
    )
    tokens = trl_sft(place, [stringed], **only)
    yield Exhibit(
        "4-arguments",
        "Arguments as JSON strings, as APIs send them, are encoded once more",
        (trl_row(place, "SFTTrainer", [stringed], tokens, **only), *ours(place, "sft", [stringed])),
    )


CASES = {
    1: ("Results of tools are trained as if the model had written them", tool_results),
    2: ("Calls get arguments that nobody gave", null_keys),
    3: ("The answer is cut off", cut_answer),
    4: ("The chat template leaves out or changes what was said", templates),
}


def shortened(row: PaintedRow) -> PaintedRow:
    """The row without the middle of long stretches that carry no loss; what is trained stays whole."""
    sides = (dataclasses.replace(side, segments=tuple(map(_shortened, side.segments))) for side in row.sides)
    return dataclasses.replace(row, sides=tuple(sides))


def _shortened(segment: Segment) -> Segment:
    text = segment.text
    if segment.trained or len(text) <= SHOWN:
        return segment
    return Segment((Piece(f"{text[: SHOWN // 4]} […] {text[-SHOWN // 2 :]}", ()),), False)


def show(exhibit: Exhibit, console: Console) -> None:
    console.print(exhibit.words, style="bold", markup=False, highlight=False)
    print_rows(map(shortened, exhibit.rows), console)
    for note in exhibit.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


LIGHT = (222, 224, 228)
DARK = TerminalTheme((30, 32, 36), LIGHT, [(0, 0, 0), (255, 112, 104), (112, 202, 122), *[LIGHT] * 5])


def draw(exhibit: Exhibit, path: Path) -> None:
    """Writes the exhibit as a picture that loads nothing."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.no_color = False
    show(exhibit, console)
    svg = console.export_svg(title="on green: carries loss", unique_id=f"loss-{exhibit.name}", theme=DARK)
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what TRL trains on rollouts as they are, and what gymtrl does.")
    parser.add_argument("case", nargs="?", type=int, choices=CASES, help="one of the failures; all without")
    parser.add_argument("--model", default="models/tools", help="folder with a tokenizer (default: %(default)s)")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="write pictures, too")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of an option that TRL still sets
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()
    if given.svg is not None:
        given.svg.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as base:
        for number in [given.case] if given.case else CASES:
            title, exhibits = CASES[number]
            console.print(f"{number}. {title}\n", style="bold", markup=False, highlight=False)
            for exhibit in exhibits(lambda template: bench(Path(base), given.model, template)):
                show(exhibit, console)
                console.print()
                if given.svg is not None:
                    draw(exhibit, given.svg / f"{exhibit.name}.svg")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"{error}\n{error.remedy}")
