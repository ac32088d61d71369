"""Training teaches what the rollouts say, with each of four objectives, and nothing where they say nothing.

Run as: python checks/learning.py MODEL [--work runs/learning] [--out checks/results/learning.json]

From tasks to numbers: questions of reasoning_gym whose answer is Yes or No, as often the one as the other; four
rollouts of each, by the model that is trained, in the real Gym; `filter`, which holds out four tenths of the noun
triples; `format` and `train` for SFT, DPO, KTO and GRPO on recorded groups. For each held-out question, the
log-probability of the right answer with its end less that of the wrong one, before and after. Both answers are
well-formed and have two tokens, and as many right ones are Yes as No: neither format, length nor a liking for one word
raises the mean.

Each objective is trained again, with the same settings, on the same rows rearranged so that they say nothing:

- SFT: completions exchanged between tasks, none keeps its own; Yes follows questions of both kinds equally often;
- DPO: the sides of every other pair exchanged, within each right answer and rejected completion;
- KTO: labels dealt so that, within each right answer and completion, the same share is good;
- GRPO: rewards dealt anew within each group, such that the advantages of each right answer and completion sum to about
  zero.

How the rows are rearranged is drawn anew for each of DRAWS trainings, because one draw may say a little by chance.

Held is: the interval of the mean difference lies above zero for the four trainings, over questions; and it includes
zero for the four controls, over draws. Ends with status 1 otherwise. A run that was interrupted goes on with the stage
that it had come to; after a change of a constant here, give another --work.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from learning_controls import ANSWERS, CONTROLS, Columns
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from gymtrl import (
    CollectSettings,
    FilterSettings,
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatSftSettings,
    TrainDpoSettings,
    TrainGrpoSettings,
    TrainKtoSettings,
    TrainSftSettings,
    filter_rollouts,
    format_dpo,
    format_grpo,
    format_kto,
    format_sft,
    gym_session,
    train,
)
from gymtrl.comparison.estimate import MeanEstimate, cluster_mean
from gymtrl.gym.install import require_installation
from gymtrl.training.settings import TrainSettings
from gymtrl.workspace.artefact import read_manifest

AGENT = "reasoning_gym_simple_agent"
TASKS_AN_ANSWER = 110
WORKED_TURN = (
    {
        "role": "user",
        "content": "Consider these statements:\n1. All cats are pets\n\n"
        "Does it logically follow that:\nAll pets are cats?\n(Answer Yes or No)",
    },
    {"role": "assistant", "content": "No"},
)
"""Chosen beforehand among 20, on questions of another seed: with it the untrained model says Yes about as often as No,
to questions of both kinds, and hardly anything else."""

COLLECT = CollectSettings(repeats=4, temperature=1.0, top_p=1.0, max_output_tokens=8, seed=0)
FILTER = FilterSettings(reward_threshold=1.0, cluster="metadata.twin", validation=0.4, split_salt="learning")
SETTINGS: dict[str, TrainSettings] = {
    "sft": TrainSftSettings(),
    "dpo": TrainDpoSettings(learning_rate=2e-4, effective_batch=4),
    "kto": TrainKtoSettings(learning_rate=2e-4, effective_batch=8),
    "grpo": TrainGrpoSettings(learning_rate=1e-4, effective_batch=8),
}
DRAWS = 4
REAL = "real"
CONTROLS_DRAWN = tuple(f"control-{seed}" for seed in range(DRAWS))

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class HeldOut:
    """A question that no training saw.

    Attributes:
        prompt_ids (`list[int]`): As the chat template gives it.
        answer (`str`): The right one.
        cluster (`str`): Its nouns.
    """

    prompt_ids: list[int]
    answer: str
    cluster: str


@dataclass(frozen=True)
class Outcome:
    """One training, measured.

    Attributes:
        objective (`str`): Which.
        data (`str`): `real`, or `control-` and the seed of the draw.
        rows, steps (`int`): Training rows and optimizer steps.
        seconds (`float`): Training time.
        margin_before, margin_after (`float`): Mean over the held-out questions, in nats.
        difference (`MeanEstimate`): Of the margins, after less before, over the questions.
        yes_before, yes_after (`float`): Mean log-probability of Yes less that of No, whichever is right.
    """

    objective: str
    data: str
    rows: int
    steps: int
    seconds: float
    margin_before: float
    margin_after: float
    difference: MeanEstimate
    yes_before: float
    yes_after: float


@dataclass(frozen=True)
class Finding:
    """What one objective teaches.

    Attributes:
        objective (`str`): Which.
        real (`MeanEstimate`): Difference of the margins, over the questions.
        control (`MeanEstimate`): The same difference of each control, over the draws.
    """

    objective: str
    real: MeanEstimate
    control: MeanEstimate

    @property
    def as_claimed(self) -> bool:
        """The interval lies above zero, and that of the controls includes it."""
        return self.real.low > 0 and self.control.low <= 0 <= self.control.high


def make_tasks() -> Rows:
    """Gym input rows: as many questions with Yes as with No, with one worked turn before each."""
    gym = require_installation(None, "reasoning_gym")
    script = Path(__file__).with_name("learning_tasks.py")
    command = [gym.python, "-W", "ignore", str(script), str(8 * TASKS_AN_ANSWER), "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    of_answer = [[entry for entry in entries if entry["answer"] == answer][:TASKS_AN_ANSWER] for answer in ANSWERS]
    return [_task(entry) for entry in itertools.chain(*zip(*of_answer, strict=True))]


def _task(entry: dict[str, Any]) -> dict[str, Any]:
    premises = [entry["metadata"][name].split() for name in ("premise1", "premise2")]
    nouns = sorted({words[place] for words in premises for place in (1, -1)})
    return {
        "responses_create_params": {"input": [*WORKED_TURN, {"role": "user", "content": entry["question"]}]},
        "question": entry["question"],
        "answer": entry["answer"],
        "metadata": entry["metadata"] | {"twin": " ".join(nouns)},
        "agent_ref": {"name": AGENT},
    }


def prepare(model: Path, work: Path) -> None:
    """Tasks, rollouts, `work/filtered` and a dataset `work/formatted/NAME` for each objective."""
    rollouts, filtered = work / "rollouts.jsonl", work / "filtered"
    if not filtered.exists():
        tasks = make_tasks()
        with gym_session("reasoning_gym", work / "logs") as session:
            session.collect(model, tasks, rollouts, COLLECT, name="rollouts")
        filter_rollouts([rollouts], filtered, FILTER)
    name, out = str(model), work / "formatted"
    made: dict[str, Callable[[], object]] = {
        "sft": lambda: format_sft(filtered, out / "sft", FormatSftSettings(model=name)),
        "dpo": lambda: format_dpo(filtered, out / "dpo", FormatDpoSettings(model=name)),
        "kto": lambda: format_kto(filtered, out / "kto", FormatKtoSettings(model=name, cap_per_task=1)),
        "grpo": lambda: format_grpo(filtered, out / "grpo", FormatGrpoSettings(model=name, kind="groups")),
    }
    for objective, write in made.items():
        if not (out / objective).exists():
            write()


def dataset(work: Path, objective: str, data: str) -> Path:
    """The training rows of a dataset as `format` wrote them, or rearranged; held-out rows are left out."""
    source, out = work / "formatted" / objective, work / "datasets" / f"{objective}-{data}"
    if out.exists():
        return out
    partial = out.with_name(f".{out.name}.partial")
    (partial / "data").mkdir(parents=True, exist_ok=True)
    (partial / "manifest.json").write_bytes((source / "manifest.json").read_bytes())
    (file,) = (source / "data").glob("train-*.parquet")
    table = pq.read_table(file)
    if data != REAL:
        columns: Columns = {name: table[name].to_pylist() for name in table.column_names}
        changed = CONTROLS[objective](columns, _right_answers(work, columns), random.Random(CONTROLS_DRAWN.index(data)))
        for name, values in changed.items():
            field = table.schema.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))
    pq.write_table(table, partial / "data" / file.name)
    return partial.rename(out)


def _right_answers(work: Path, columns: Columns) -> list[str]:
    """The right answer to each row's question."""
    answers = {}
    with (work / "rollouts_materialized_inputs.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            answers[row["question"]] = row["answer"]
    return [answers[_content(prompt[-1])] for prompt in columns["prompt"]]


def _content(message: str) -> str:
    content: str = json.loads(message)["content"]
    return content


def held_out(model: Path, work: Path) -> list[HeldOut]:
    """Questions that `filter` held out, as many with Yes as with No; what is left over of the one is not used."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (work / "filtered" / "heldout_inputs.jsonl").read_text().splitlines()]
    of_answer = [[row for row in rows if row["answer"] == answer] for answer in ANSWERS]
    found = []
    for row in itertools.chain(*zip(*of_answer, strict=False)):
        messages = row["responses_create_params"]["input"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        found.append(HeldOut(prompt, row["answer"], row["metadata"]["twin"]))
    return found


def preferences(model: Path, questions: list[HeldOut], path: Path) -> list[float]:
    """For each question the log-probability of Yes and its end less that of No and its end, kept in `path`."""
    if path.exists():
        kept: list[float] = json.loads(path.read_text())
        return kept
    tokenizer = AutoTokenizer.from_pretrained(model)
    endings = [tokenizer(answer + tokenizer.eos_token)["input_ids"] for answer in ANSWERS]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        sums = [_log_probs(loaded, question.prompt_ids, endings) for question in questions]
    found = [yes - no for yes, no in sums]
    path.write_text(json.dumps(found))
    return found


def _log_probs(model: Any, prompt_ids: list[int], endings: list[list[int]]) -> list[float]:
    """Summed log-probabilities of each ending; the prompt is computed once."""
    prompt = model(torch.tensor([prompt_ids]), use_cache=True, logits_to_keep=1)
    first, sums = prompt.logits[0].log_softmax(-1), []
    for ids in endings:
        cache = copy.deepcopy(prompt.past_key_values)
        rest = model(torch.tensor([ids[:-1]]), past_key_values=cache).logits[0].log_softmax(-1)
        sums.append(torch.cat([first, rest]).gather(-1, torch.tensor(ids)[:, None]).sum().item())
    return sums


def outcome(model: Path, work: Path, questions: list[HeldOut], objective: str, data: str) -> Outcome:
    """Trains once, if that is not done, and measures."""
    run = work / "runs" / f"{objective}-{data}"
    if not run.exists():
        train(dataset(work, objective, data), run, SETTINGS[objective])
    signs = [1 if question.answer == ANSWERS[0] else -1 for question in questions]
    before = preferences(model, questions, work / "before.json")
    after = preferences(run / "model", questions, run / "preferences.json")
    differences = [sign * (b - a) for sign, a, b in zip(signs, before, after, strict=True)]
    facts: Any = read_manifest(run).extra
    return Outcome(
        objective=objective,
        data=data,
        rows=facts["plan"]["rows"],
        steps=facts["plan"]["steps"],
        seconds=round(facts["results"]["seconds"], 1),
        margin_before=mean(sign * a for sign, a in zip(signs, before, strict=True)),
        margin_after=mean(sign * b for sign, b in zip(signs, after, strict=True)),
        difference=balanced_mean(differences, questions),
        yes_before=mean(before),
        yes_after=mean(after),
    )


def balanced_mean(values: list[float], questions: list[HeldOut]) -> MeanEstimate:
    """Mean with the interval of `gymtrl compare`, by clusters, within the questions of each right answer.

    As many questions of each were taken by design, so how far apart the two halves lie is no chance, and a liking for
    one word moves them apart.
    """
    halves = {answer: [v for v, q in zip(values, questions, strict=True) if q.answer == answer] for answer in ANSWERS}
    within = [value - mean(halves[question.answer]) for value, question in zip(values, questions, strict=True)]
    spread, middle = cluster_mean(within, [question.cluster for question in questions]), mean(values)
    return replace(spread, mean=middle, low=middle + spread.low, high=middle + spread.high)


def check(model: Path, work: Path) -> Iterator[Outcome]:
    """All four objectives, each with its controls."""
    work.mkdir(parents=True, exist_ok=True)
    prepare(model, work)
    questions = held_out(model, work)
    for objective, data in itertools.product(SETTINGS, (REAL, *CONTROLS_DRAWN)):
        found = outcome(model, work, questions, objective, data)
        print(f"{objective}, {data}: {_interval(found.difference)} after {found.seconds:.0f} s", flush=True)
        yield found


def _interval(estimate: MeanEstimate) -> str:
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def findings(outcomes: list[Outcome]) -> list[Finding]:
    """One of each objective."""
    found = []
    for objective in SETTINGS:
        means = {one.data: one.difference.mean for one in outcomes if one.objective == objective}
        (real,) = (one.difference for one in outcomes if (one.objective, one.data) == (objective, REAL))
        control = cluster_mean([means[data] for data in CONTROLS_DRAWN], CONTROLS_DRAWN)
        found.append(Finding(objective, real, control))
    return found


def results(outcomes: list[Outcome], work: Path) -> dict[str, Any]:
    """What the JSON file holds."""
    facts: Any = read_manifest(work / "filtered").extra
    return {
        "passed": all(found.as_claimed for found in findings(outcomes)),
        "findings": [asdict(found) | {"as_claimed": found.as_claimed} for found in findings(outcomes)],
        "tasks": facts["tasks"],
        "rollouts": COLLECT.model_dump(mode="json", exclude_unset=True) | {"kept": facts["rollouts"]},
        "held_out_measured": outcomes[0].difference.n,
        "settings": {name: one.model_dump(mode="json", exclude_unset=True) for name, one in SETTINGS.items()},
        "trainings": [asdict(one) for one in outcomes],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("gymtrl", "torch", "transformers", "trl", "peft")},
    }


def show(outcomes: list[Outcome]) -> Table:
    """A line for each objective."""
    table = Table("objective", "rows", "steps", "real", "control", "draws", "seconds each")
    for found in findings(outcomes):
        real, *drawn = (one for one in outcomes if one.objective == found.objective)
        draws = ", ".join(f"{one.difference.mean:+.2f}" for one in drawn)
        seconds = f"{mean(one.seconds for one in (real, *drawn)):.0f}"
        sizes, intervals = (real.rows, real.steps), (found.real, found.control)
        table.add_row(found.objective, *map(str, sizes), *map(_interval, intervals), draws, seconds)
    return table


def main() -> int:
    """Checks, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint that is rolled out and trained")
    parser.add_argument("--work", type=Path, default=Path("runs") / "learning", help="folder for all that is made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    start = time.monotonic()
    outcomes = list(check(options.model.resolve(), options.work))
    found = results(outcomes, options.work)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    Console().print(show(outcomes))
    print(f"{'as claimed' if found['passed'] else 'not as claimed'}, in {time.monotonic() - start:.0f} s")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
