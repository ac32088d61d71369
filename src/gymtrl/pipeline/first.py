"""A recipe to begin with, for the user's rollouts and machine: every setting with what it means, few of them set."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from gymtrl.errors import UserError
from gymtrl.pipeline.schema import TITLE, recipe_schema
from gymtrl.pipeline.sections import SECTIONS, Objective
from gymtrl.rollouts.inputs import expand_inputs, expand_patterns
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.rollouts.outputs import check_output
from gymtrl.rollouts.summary import Summary
from gymtrl.rollouts.suspicions import MEASURED
from gymtrl.text import plain
from gymtrl.training.machine import machine
from gymtrl.workspace.spool import spooled
from gymtrl.workspace.stage import job_folder

SCHEMA_NAME = "recipe.schema.json"

ENOUGH = 64
"""Pairs, or rollouts of each kind, that preferences are recommended from: one batch of DPO (Tülu 3)."""

MOSTLY = 0.5
"""Share of good rollouts from which on learning to imitate them teaches little that is new (ours)."""

_WIDTH = 112
_SET = ("validation", "cap_per_task", "method", "server")


@dataclass(frozen=True)
class Advice:
    """What to train on these rollouts.

    Attributes:
        objective (`str`): `sft`, `dpo` or `kto`.
        why (`str`): In a sentence, with the figures.
    """

    objective: Objective
    why: str


def advise(summary: Summary, good: int | None, bad: int | None) -> Advice:
    """Recommends an objective.

    Recorded groups are never recommended: training on them is experimental.

    Args:
        summary (`Summary`): Of the rollouts.
        good, bad (`int`, *optional*): Whole rollouts that reach the threshold, and the others; `None` where there is
            no threshold.
    """
    pairs, rows = summary.good_for.dpo_pairs, summary.good_for.sft_rows
    if good is None or bad is None or pairs is None or rows is None:
        return Advice("sft", f"which rollouts are good is not known ({summary.good_for.threshold_why})")
    counts = f"{good:,} of {good + bad:,} rollouts are good"
    if not good:
        return Advice("sft", f"{counts}: there is nothing to learn from yet; filter will say so")
    if good < MOSTLY * (good + bad):
        return Advice("sft", f"{counts}: imitating them ({rows:,} distinct ones) teaches what the model seldom does")
    if pairs >= ENOUGH:
        return Advice("dpo", f"{counts}, and {pairs:,} tasks have a good and a bad one: pairs show the difference")
    if bad >= ENOUGH:
        return Advice("kto", f"{counts}, but only {pairs:,} tasks have a good and a bad one: kto takes them unpaired")
    return Advice("sft", f"{counts}; preferences want at least {ENOUGH} tasks with a good and a bad one, not {pairs:,}")


def write_recipe(rollouts: Sequence[Path], model: str, path: Path, *, force: bool = False) -> Advice:
    """Looks at the rollouts and writes a commented recipe, and beside it the schema for editors.

    Args:
        rollouts (`Sequence[Path]`): Files, folders of them, or patterns.
        model (`str`): The model to train.
        path (`Path`): The recipe to write.
        force (`bool`, *optional*, defaults to `False`): Replace files of their names; an older schema of ours always
            is.

    Returns:
        `Advice`: The objective that it recommends, and why.

    Raises:
        UserError: The recipe, or another file under the schema's name, is there already, the recipe would overwrite a
            rollout file, or the rollouts cannot be read.
    """
    if "-" in map(str, rollouts):
        raise UserError("a recipe names files, and standard input is none", remedy="save the rollouts to a file")
    files = expand_patterns(rollouts)
    check_output(path, files)
    if path.exists() and not force:
        raise UserError(f"{path} is there already", remedy="name another file with -o, or replace it with --force")
    schema_path = path.with_name(SCHEMA_NAME)
    if schema_path.exists() and not force and not _is_schema(schema_path):
        raise UserError(
            f"{schema_path} is there already and no schema of ours",
            remedy="write the recipe into another folder with -o, or replace that file with --force",
        )
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.parquet"
        summary = inspect_rollouts(expand_inputs(spooled(files, Path(folder))), table=table)
        good, bad = _good_and_bad(summary, table)
    advice = advise(summary, good, bad)
    text = recipe_text(rollouts, model, job_folder(files[0]), summary, advice)
    schema = json.dumps(recipe_schema(), indent=1, ensure_ascii=False)
    for target, content in ((schema_path, schema + "\n"), (path, text)):
        draft = target.with_name(f".{target.name}.partial")
        draft.write_text(content, encoding="utf-8")
        draft.replace(target)
    return advice


def recipe_text(rollouts: Sequence[Path], model: str, out: Path, summary: Summary, advice: Advice) -> str:
    """Returns a recipe in which every setting of its stages is explained and the few that matter are set."""
    named = [str(path) for path in rollouts]
    job = {"rollouts": named[0] if len(named) == 1 else named, "model": model, "out": str(out)}
    objective = advice.objective
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_NAME}",
        *_comment("'gymtrl run' goes through the stages below; 'gymtrl run --dry-run' shows what it would do. What is "
                  "commented out has its default. Paths count from where gymtrl is started."),
        *_comment(f"This machine: {_machine()}."),
        *_comment(f"These rollouts: {summary.lines:,} lines, {summary.tasks.tasks:,} tasks, sampled from "
                  f"{_names(summary.models)}; {summary.good_for.threshold_why}."),
        "",
        *(f"{key}: {_yaml(value)}" for key, value in job.items()),
        "",
        *_comment(f"What to train. {objective}: {advice.why}."),
        *_comment(f"For sft there are {_count(summary.good_for.sft_rows)} rows, for dpo "
                  f"{_count(summary.good_for.dpo_pairs)} tasks with a good and a bad rollout, for grpo from recorded "
                  f"groups (experimental) {summary.good_for.grpo_groups:,} groups."),
        f"objective: {objective}",
    ]  # fmt: skip
    for verb in ("filter", f"format {objective}", f"train {objective}"):
        lines += ["", *_section(verb, SECTIONS[verb].__doc__ or "", summary)]
    needs = "Needs 'gymtrl gym setup' with the server of these tasks, and 'tasks' where none were held out with inputs."
    validate = _section("validate", f"{SECTIONS['validate'].__doc__} {needs}", summary)
    return "\n".join([*lines, "", *(line if line.startswith("#") else f"# {line}".rstrip() for line in validate), ""])


def _is_schema(path: Path) -> bool:
    """Whether a file is a schema that we wrote, of any version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("title") == TITLE


def _section(verb: str, words: str, summary: Summary) -> list[str]:
    """A section: each setting below what it means and where its default comes from."""
    lines = [*_comment(words), f"{verb}:"]
    values, notes = _of_the_rollouts(summary) if verb == "filter" else ({}, {})
    for name, field in SECTIONS[verb].model_fields.items():
        if name == "model":  # named for the whole job
            continue
        lines += [*_comment(f"{_words(field)} {notes.get(name, '')}", indent="  ")]
        value = values.get(name, _default(field))
        shown = f" {_yaml(value)}" if value is not None else ""
        active = value is not None and (name in _SET or name in values)
        lines += [f"  {'' if active else '# '}{name}:{shown}", ""]
    return lines[:-1]


def _of_the_rollouts(summary: Summary) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of the filter that these rollouts want otherwise than by default, and what they say of one."""
    good = summary.good_for
    known = good.threshold is not None or good.thresholds
    threshold = f"Of these rollouts: {good.threshold:g}." if good.threshold is not None else good.threshold_why
    notes = {"reward_threshold": threshold if known else f"IT NEEDS A VALUE HERE: {good.threshold_why}."}
    # One cluster alone cannot be divided.
    return ({"validation": 0.0} if summary.tasks.clusters < 2 else {}), notes


def _words(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    source = f" [{extra['source']}]" if isinstance(extra, dict) and "source" in extra else ""
    return f"{(field.description or '').rstrip('.')}.{source}"


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return None
    return to_jsonable_python(field.get_default(call_default_factory=True))


def _comment(text: str, indent: str = "") -> list[str]:
    """Text of any origin as comment lines: nothing in it can end the comment."""
    return textwrap.wrap(plain(text), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _yaml(value: Any) -> str:
    """A value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=2**20, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def _names(counts: dict[str, int]) -> str:
    names = [name or "an unnamed model" for name in list(counts)[:3]]
    return ", ".join(names) + (f" and {len(counts) - 3} more" if len(counts) > 3 else "") if names else "no model"


def _good_and_bad(summary: Summary, table: Path) -> tuple[int, int] | tuple[None, None]:
    """Whole rollouts with a valid reward: those that reach their threshold, and those that do not."""
    known = summary.good_for
    if known.threshold is None and not known.thresholds:
        return None, None
    whole = MEASURED & ~pl.col("truncated") & pl.col("fault").is_null()
    rows = pl.scan_parquet(table, glob=False).filter((pl.col("verdict") == "ok") & whole)
    counted = rows.group_by("environment", "agent", "reward").len().collect()
    good = bad = 0
    for environment, agent, reward, number in counted.iter_rows():
        threshold = known.threshold_of(environment, agent)
        if threshold is not None:
            good, bad = (good + number, bad) if reward >= threshold else (good, bad + number)
    return good, bad


def _machine() -> str:
    """Cores, memory and GPUs in words."""
    found = machine(gpus=True)
    memory = f"{found.memory / 2**30:.0f} GiB of memory" + (f" ({found.limit})" if found.limit != "memory" else "")
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in found.gpus).items())
    return f"{found.cores} cores, {memory} to be had, {gpus or 'no GPU'}"
