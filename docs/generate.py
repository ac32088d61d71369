"""The parts of the pages that come from the code, written between `<!-- generated: NAME -->` and `<!-- end -->`.

Also the notebook of the tutorial, from its page.

Run as: python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from command_line import command_line
from notebook import notebook
from pydantic import BaseModel

from gymtrl.comparison.settings import CompareSettings
from gymtrl.doctor.rule import OBJECTIVES
from gymtrl.doctor.rules import RULES as DOCTOR_RULES
from gymtrl.doctor.worse import CHANGE_RULES
from gymtrl.formats.card import COLUMN_WORDS
from gymtrl.formats.dataset import COLUMNS as DATASET_COLUMNS
from gymtrl.formats.reasons import CHOICE_DROPS, ROW_DROPS, Drop
from gymtrl.home import gymtrl_home
from gymtrl.models.smollm2 import make_smollm2
from gymtrl.pipeline.sections import SECTIONS, JobSettings
from gymtrl.rollouts.columns import COLUMNS
from gymtrl.rollouts.reasons import FAULTS, FLAGS, REASONS
from gymtrl.selection.rules import RULES
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.fit import LARGEST_MICRO_BATCH
from gymtrl.training.objective import Objective
from gymtrl.training.objectives import OBJECTIVES as TRAINED
from gymtrl.training.plan import LARGE_DATA

FOLDER = Path(__file__).parent
TUTORIAL = FOLDER / "tutorial.md"
_PART = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TYPES = {pl.String(): "text", pl.Int64(): "integer", pl.Float64(): "number", pl.Boolean(): "yes or no"}


def generated(page: str) -> str:
    """A page with its generated parts as the code has them now."""
    return _PART.sub(lambda part: f"{part[1]}\n{_PARTS[part[2]]()}\n{part[3]}", page)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _verdicts(kind: str) -> str:
    found = ((f"`{code}`", r.meaning, r.remedy) for code, r in REASONS.items() if r.kind == kind)
    return _table(("code", "what it means", "what to do"), ((code, _tags(m), _tags(r)) for code, m, r in found))


def _remarks(words: dict[str, str]) -> str:
    return _table(("code", "what it means"), ((f"`{code}`", _tags(text)) for code, text in words.items()))


def _columns() -> str:
    return _table(("column", "type", "what it holds"), ((f"`{c.name}`", _type(c.kind), c.words) for c in COLUMNS))


def _type(kind: pl.DataType) -> str:
    return "list of texts" if kind == pl.List(pl.String()) else _TYPES[kind]


def _rules() -> str:
    return "".join(f"{place}. `{rule.name}`: {rule.words}\n" for place, rule in enumerate(RULES, start=1))


def _settings() -> str:
    rows = _settings_of(FilterSettings).values()
    return _table(("flag", "type", "default", "what it does", "where the default comes from"), rows)


def _filter_parameters() -> str:
    rows = (row[:4] for row in _settings_of(FilterSettings).values())
    return _table(("parameter", "type", "default", "what it does"), rows)


def _key_options() -> str:
    """Of the defaults of SFT those that most decide a run."""
    rows = {row[0].strip("`"): row for row in _defaults_of(TRAINED["sft"])}
    told = (rows[name] for name in _KEY_OPTIONS)
    return _table(("option", "default", "reason"), ((name, default, why) for name, default, _, why in told))


def _gpu_plan() -> str:
    """What the planner says of SFT of a 7B model, on GPUs that need not be here."""
    from transformers import Qwen2Config

    from gymtrl.training.machine import Gpu, Machine
    from gymtrl.training.memory import model_shape
    from gymtrl.training.plan import plan

    sft, gib = TRAINED["sft"], 2**30
    shape = model_shape(Qwen2Config(**_QWEN2_5_7B))
    made = {}
    for name, (count, size, asked) in _GPUS.items():
        gpus = (Gpu(name, size * gib, size * gib, bfloat16=True),) * count
        where = Machine(memory=512 * gib, limit="memory", cores=64, gpus=gpus)
        settings = sft.settings(nproc=count, **asked)
        made[name] = plan(settings, sft, rows=5000, longest=4096, shape=shape, machine=where)
    rows: list[list[str]] = []
    for number in ("steps", "effective_batch", "micro_batch", "accumulation", "gradient_checkpointing", "dtype"):
        rows.append([f"`{number}`", *(str(getattr(one.plan, number)) for one in made.values())])
    rows.append(["`learning_rate`", *(f"{one.plan.learning_rate:g}" for one in made.values())])
    rows.append(["memory a process", *(f"{one.memory.total / gib:.0f} GiB" for one in made.values())])
    return _table(("", *made), rows)


def _compare_settings() -> str:
    rows = _settings_of(CompareSettings).values()
    return _table(("flag", "type", "default", "what it does", "where the default comes from"), rows)


def _settings_of(model: type[BaseModel]) -> dict[str, tuple[str, ...]]:
    """Of each setting its flags, type, default, meaning and the source of its default."""
    shapes = model.model_json_schema()["properties"]
    rows = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = "-".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default).lower()
        unset = field.is_required() or field.default is None or field.default_factory is not None
        default = "" if unset else f"`{value}`"
        source = str(extra.get("source", ""))
        assert source, f"{model.__name__}.{name} does not say where its default comes from"
        also = extra.get("flags", [])
        assert isinstance(also, list)
        flags = ", ".join(f"`{flag}`" for flag in (f"--{name.replace('_', '-')}", *also))
        rows[name] = (flags, _shape(shapes[name]), default, field.description or "", source)
    return rows


def _format_settings() -> str:
    head = ("flag", "verbs", "type", "default", "what it does", "where the default comes from")
    return _table(head, _shared({verb: list(_settings_of(model).values()) for verb, model in _FORMATS.items()}))


def _shared(rows: dict[str, list[tuple[str, ...]]]) -> Iterable[tuple[str, ...]]:
    """The rows of several tables in one, in whose second column stands which of them have the row."""
    having: dict[tuple[str, ...], list[str]] = {}
    for name, own in rows.items():
        for row in own:
            having.setdefault(row, []).append(name)
    for row, names in having.items():
        yield row[0], "all" if len(names) == len(rows) else ", ".join(names), *row[1:]


def _defaults() -> str:
    """A row for each setting of train; one that objectives differ in has several."""
    rows = {name: _defaults_of(objective) for name, objective in TRAINED.items()}
    order = {row[0]: None for own in rows.values() for row in own}
    shared = list(_shared(rows))
    alike = [row for name in order for row in shared if row[0] == name]
    return _table(("setting", "of", "default", "what it does", "where the default comes from"), alike)


def _defaults_of(objective: Objective) -> list[tuple[str, ...]]:
    own, rows = objective.defaults, []
    chosen = {
        "model": ("the one that the dataset was made for", None),
        "learning_rate": (f"{own.lora_rate:g} with an adapter, {own.full_rate:g} full", own.rate_source),
        "epochs": (f"1 above {LARGE_DATA:,} rows, else {own.epochs:g}" if own.epochs != 1 else "1", own.epochs_source),
        "max_steps": ("epochs × rows / effective batch", None),
        "effective_batch": (
            f"rows × epochs / 50, at least {own.least_batch} and at most {own.most_batch}",
            own.batch_source,
        ),
        "micro_batch": (f"{objective.least_micro} on CPU; what fits a GPU, at most {LARGEST_MICRO_BATCH}", None),
        "save_steps": ("a tenth of the steps", None),
        "gradient_checkpointing": ("only where it is needed to fit", None),
        "loss_weights": ("1 each", None),
        "desirable_weight": ("computed by `format kto`", None),
        "undesirable_weight": ("computed by `format kto`", None),
        "peft": ("`target_modules` all-linear, `lora_dropout` 0", None),
        "quantization": ("4 bits, NF4, double quantization", None),
    }
    for name, field in objective.settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = field.get_default(call_default_factory=True)
        plain = ", ".join(f"`{one}`" for one in value) if isinstance(value, list) else f"`{value}`"
        default, source = chosen.get(name, ("none" if value in (None, [], {}) else plain, None))
        words = (field.description or "").split(". Unset:")[0]
        rows.append((f"`{name}`", default, words, source or str(extra.get("source", ""))))
    return rows


def _job_keys() -> str:
    return _table(("key", *_HEAD), _keys_of(JobSettings))


def _recipe_sections() -> str:
    """A table for each verb; its kinds, such as those of format, share one."""
    verbs: dict[str, dict[str, type[BaseModel]]] = {}
    for section, model in SECTIONS.items():
        verb, _, kind = section.partition(" ")
        verbs.setdefault(verb, {})[kind] = model
    parts = []
    for verb, kinds in verbs.items():
        rows = {kind: _keys_of(model) for kind, model in kinds.items()}
        title = ", ".join(f"`{verb} {kind}`" if kind else f"`{verb}`" for kind in kinds)
        table = (
            _table(("key", "of", *_HEAD), _shared(rows)) if len(rows) > 1 else _table(("key", *_HEAD), *rows.values())
        )
        parts.append(f"### {title}\n\n{table}")
    return "\n".join(parts)


def _keys_of(model: type[BaseModel]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", *row[1:]) for name, row in _settings_of(model).items()]


def _dataset_columns() -> str:
    def datasets(name: str) -> str:
        holding = [objective for objective, columns in DATASET_COLUMNS.items() if name in columns]
        words = (objective.replace("_", " ") for objective in holding)
        return "all" if len(holding) == len(DATASET_COLUMNS) else ", ".join(words)

    names = dict.fromkeys(name for columns in DATASET_COLUMNS.values() for name in columns)
    return _table(("column", "datasets", "what it holds"), ((f"`{n}`", datasets(n), COLUMN_WORDS[n]) for n in names))


def _drops(drops: dict[str, Drop]) -> str:
    rows = ((f"`{code}`", _tags(drop.meaning), _tags(drop.remedy)) for code, drop in drops.items())
    return _table(("code", "what it means", "what to do"), rows)


def _doctor() -> str:
    names = {
        "objective": "OBJECTIVE",
        "dataset": "DATASET",
        "rate": "RATE",
        "longer": "with --epochs N or a smaller --effective-batch",
    }
    rows = (
        (
            f"`{rule.code}`",
            rule.severity,
            "all" if rule.objectives == OBJECTIVES else ", ".join(rule.objectives),
            ", ".join(words for moment, words in _MOMENTS.items() if moment in rule.when),
            f"{rule.title}. {_code(rule.cause)}",
            _code(rule.remedy.format_map(names)) + ".",
            rule.source + (". Ends the run" if rule.stops else ""),
        )
        for rule in DOCTOR_RULES
    )
    return _table(("code", "severity", "objectives", "when", "what it means", "what to do", "threshold"), rows)


def _worse() -> str:
    rows = (
        (f"`{r.code}`", r.severity, f"{r.title}. {_code(r.cause)}", f"{_code(r.remedy)}.", r.source)
        for r in CHANGE_RULES
    )
    return _table(("code", "severity", "what it means", "what to do", "threshold"), rows)


def _shape(schema: dict[str, Any]) -> str:
    """The type of a setting in words, from its JSON schema."""
    schema = next((one for one in schema.get("anyOf", []) if one["type"] != "null"), schema)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return "two numbers" if "prefixItems" in schema else f"{_shape(schema['items'])}s"
    if schema.get("format") == "path":
        return "path"
    return {"string": "text", "boolean": "yes or no", "object": "mapping"}.get(schema["type"], schema["type"])


def _templates() -> str:
    columns, found = _outcomes()
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in found.items():
        alike.setdefault(tuple(cells[column] for column in columns), []).append(f"`{name}`")
    return _table(("template", *columns), ((", ".join(names), *cells) for cells, names in alike.items()))


def _refusals() -> str:
    return _table(
        ("short", "code", "what it means"),
        ((f"{short}", f"`{code}`", words) for code, (short, words) in _conversations().REFUSALS.items()),
    )


def _conversations() -> Any:
    sys.path.insert(0, str(FOLDER.parent / "tests"))
    import conversations

    return conversations


def _outcomes() -> tuple[list[str], dict[str, dict[str, str]]]:
    """The conversations that templates differ in, and what comes of them with each template."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    folder = gymtrl_home() / "models" / "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder if folder.exists() else make_smollm2(folder))
    found = _conversations().outcomes(tokenizer)
    columns = [c for c in _conversations().CONVERSATIONS if len({cells[c] for cells in found.values()}) > 1]
    return columns, found


def _tags(text: str) -> str:
    """Words with what looks like a tag or a flag as code, so that Markdown shows it."""
    return re.sub(r"(</?think>|--[a-z][a-z-]+)", r"`\1`", text)


_HEAD = ("type", "default", "what it does", "where the default comes from")
_FORMATS = {verb.split()[1]: model for verb, model in SECTIONS.items() if verb.startswith("format ")}


def _code(text: str) -> str:
    """Words with quoted commands and flags as code."""
    return re.sub(r"'(gymtrl [^']+)'|(--[a-z][a-z-]+)", lambda found: f"`{found[1] or found[2]}`", text)


_KEY_OPTIONS = (
    "method",
    "learning_rate",
    "epochs",
    "effective_batch",
    "micro_batch",
    "warmup_ratio",
    "scheduler",
    "lora_r",
    "lora_alpha",
    "gradient_checkpointing",
    "save_steps",
    "seed",
)
# As the model's own configuration has it.
_QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_GPUS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "LoRA, one GPU of 80 GiB": (1, 80, {}),
    "QLoRA, one GPU of 24 GiB": (1, 24, {"method": "qlora"}),
    "every weight, 8 GPUs of 80 GiB": (8, 80, {"method": "full", "engine": "fsdp2"}),
}
_MOMENTS = {"preflight": "before", "live": "in training", "after": "afterwards"}
_PARTS: dict[str, Callable[[], str]] = {
    "commandline": lambda: command_line(_table),
    "context": lambda: _verdicts("context"),
    "reject": lambda: _verdicts("reject"),
    "skip": lambda: _verdicts("skip"),
    "faults": lambda: _remarks(FAULTS),
    "flags": lambda: _remarks(FLAGS),
    "columns": _columns,
    "rules": _rules,
    "settings": _settings,
    "filterparameters": _filter_parameters,
    "keyoptions": _key_options,
    "gpuplan": _gpu_plan,
    "comparesettings": _compare_settings,
    "formatsettings": _format_settings,
    "jobkeys": _job_keys,
    "recipesections": _recipe_sections,
    "formatcolumns": _dataset_columns,
    "rowdrops": lambda: _drops(ROW_DROPS),
    "choicedrops": lambda: _drops(CHOICE_DROPS),
    "templates": _templates,
    "refusals": _refusals,
    "doctor": _doctor,
    "worse": _worse,
    "defaults": _defaults,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of the pages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    check = parser.parse_args().check
    written = {path: generated(path.read_text()) for path in sorted(FOLDER.glob("*.md"))}
    if TUTORIAL in written:
        written[TUTORIAL.with_suffix(".ipynb")] = notebook(written[TUTORIAL])
    stale = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path} is stale: run python docs/generate.py" if check else f"→ {path}")
        if not check:
            path.write_text(written[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
