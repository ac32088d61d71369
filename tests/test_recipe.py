"""Recipes: what is refused and where, the schema for editors, and the recipe that init writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from typer.main import get_command

from gymtrl.cli.main import app
from gymtrl.errors import UserError
from gymtrl.pipeline.first import SCHEMA_NAME, write_recipe
from gymtrl.pipeline.run import open_job
from gymtrl.pipeline.schema import recipe_schema
from gymtrl.pipeline.sections import SECTIONS, read_recipe
from gymtrl.training.settings import TrainSftSettings
from gymtrl.workspace.recipe import read_recipe as read
from gymtrl.workspace.settings import resolve
from rows import row, write_rows

RECIPE = (
    "rollouts: r.jsonl\nmodel: m\nfilter:\n  cap_per_task: 2\ntrain sft:\n  epochs: 3\n  trl: {adam_epsilon: 1e-5}\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def message(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_recipe(path)
    return f"{refused.value.message} | {refused.value.remedy}"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("model: m\nfiltre: {}", 2, "did you mean 'filter'"),
        ("model: m\nrollout: x", 2, "did you mean 'rollouts'"),
        ("filter:\n  dedup: near\n  cap_per_tsk: 2", 3, "section 'filter': unknown key 'cap_per_tsk'; did you mean"),
        ("train sft:\n  epoch: 2", 2, "did you mean 'epochs'"),
        ("filter:\n  seed: 1\nmodel: m\nfilter:\n  seed: 2", 4, "'filter' is in line 1 already"),
        ("filter:\n  seed: 1\n  seed: 2", 3, "'seed' is in line 2 already"),
        ("filter: {seed: 1, seed: 1}", 1, "'seed' is in line 1 already"),
        ("train sft:\n  trl:\n    optim: sgd\n    optim: adamw_torch", 4, "'optim' is in line 3 already"),
        ("model: m\nfilter: [1]", 2, "settings by name below 'filter:'"),
        ("- filter", 1, "a section per stage"),
        ("model: m\nfilter: {a: b: c}", 2, "not YAML"),
        ("model: m\n? [1]\n: 2", 2, "unknown key"),
        ("filter: &f\n  where: *f", 1, "not YAML"),
        ("filter:\n  where: !!python/object:os.system x", 2, "not YAML"),
    ],
)
def test_what_no_stage_knows_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = written(tmp_path, text)
    found = message(path)
    assert found.startswith(f"{path}:{line}:"), found
    assert words in found


@pytest.mark.parametrize("text", ["where: 2020-13-45", "\x00", "a: 'b"])
def test_what_is_no_yaml_at_all_is_refused(tmp_path: Path, text: str) -> None:
    assert "not YAML" in message(written(tmp_path, f"filter:\n  {text}"))


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not YAML" in message(path)
    assert "No such file" in message(tmp_path / "none.yaml")


class Inner(BaseModel, extra="forbid"):
    rank: int = 1


class Outer(BaseModel, extra="forbid"):
    adapter: Inner | None = None
    passed_on: dict[str, Any] = {}


def test_settings_within_settings_are_checked_and_what_is_passed_on_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, "s:\n  passed_on: {anything: 1}\n  adapter:\n    rnk: 2")
    with pytest.raises(UserError, match=r"r.yaml:4: section 's: adapter': unknown key 'rnk'; did you mean 'rank'"):
        read(path, {"s": Outer}, Inner)
    path.write_text("s:\n  passed_on: {anything: 1}\n  adapter: {rank: 2}")
    settings = resolve(Outer, section="s", recipe=read(path, {"s": Outer}, Inner)).settings
    assert (settings.adapter, settings.passed_on) == (Inner(rank=2), {"anything": 1})


def test_values_come_with_their_line_and_the_job_s_model_is_everybody_s(tmp_path: Path) -> None:
    path = written(tmp_path, RECIPE)
    resolved = resolve(TrainSftSettings, section="train sft", recipe=read_recipe(path))
    assert resolved.settings.model == "m" and resolved.origins["model"] == f"recipe {path}:2"
    assert resolved.settings.epochs == 3 and resolved.origins["epochs"] == f"recipe {path}:6"
    assert resolved.settings.trl == {"adam_epsilon": 1e-5}
    assert resolved.origins["seed"].startswith("default")
    own = written(tmp_path, RECIPE + "  model: other\n")
    assert resolve(TrainSftSettings, section="train sft", recipe=read_recipe(own)).settings.model == "other"


def test_numbers_with_exponents_are_numbers_in_sets_as_well() -> None:
    sets = ["trl.adam_epsilon=1e-8", "trl.name=1e-8x"]
    assert resolve(TrainSftSettings, section="train sft", sets=sets).settings.trl == {
        "adam_epsilon": 1e-8,
        "name": "1e-8x",
    }


def test_a_bad_value_names_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ntrain sft:\n  epochs: many")
    with pytest.raises(UserError, match=r"epochs = 'many' \(recipe .*r.yaml:3\)"):
        resolve(TrainSftSettings, section="train sft", recipe=read_recipe(path))


def test_an_empty_recipe_and_empty_sections_change_nothing(tmp_path: Path) -> None:
    assert not read_recipe(written(tmp_path, "# nothing\n")).sections
    assert read_recipe(written(tmp_path, "filter:\ntrain sft: null\n")).sections == {"filter": {}, "train sft": {}}


def test_every_verb_that_takes_a_recipe_has_a_section() -> None:
    found = set()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        for verb, inner in getattr(command, "commands", {"": command}).items():
            if any(parameter.name == "recipe" and "--recipe" in parameter.opts for parameter in inner.params):
                found.add(f"{name} {verb}".strip().replace("plan ", "train "))  # which takes the same settings
    assert found == SECTIONS.keys()


def test_the_schema_takes_what_is_right_and_refuses_what_is_not(tmp_path: Path) -> None:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    check = Draft202012Validator(schema)
    right = yaml.safe_load(RECIPE) | {"format sft": None, "format grpo": {"pass_rate": "0.1-0.9"}, "validate": {}}
    assert not list(check.iter_errors(right))
    assert not list(check.iter_errors({"rollouts": ["a", "b"], "filter": {"pass_rate": [0.1, 0.9]}}))
    for wrong in (
        {"filtre": {}},
        {"filter": {"cap_per_tsk": 2}},
        {"filter": {"cap_per_task": 0}},
        {"filter": []},
        {"objective": "ppo"},
        {"train sft": {"method": "half"}},
        {"rollouts": 3},
    ):
        assert list(check.iter_errors(wrong)), wrong
    shape = schema["$defs"]["FilterSettings"]["properties"]["cap_per_task"]
    assert shape["default"] == 4 and "RFT, arXiv 2308.01825" in shape["description"]
    sections = {name: schema["properties"][name]["anyOf"][0]["$ref"].rpartition("/")[2] for name in SECTIONS}
    assert sections == {name: model.__name__ for name, model in SECTIONS.items()}
    for model in SECTIONS.values():
        shapes = schema["$defs"][model.__name__]
        assert shapes["additionalProperties"] is False and shapes["properties"].keys() == model.model_fields.keys()


def test_the_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert read_recipe(written(tmp_path, text)).sections.keys() == {"filter", "train sft"}
    Draft202012Validator(recipe_schema()).validate(yaml.safe_load(text))


def test_the_schema_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "gymtrl", "schema"], capture_output=True, text=True)
    assert json.loads(done.stdout) == recipe_schema() and not done.stderr


def tasks(count: int, rewards: list[float], **more: Any) -> list[dict[str, Any]]:
    """So many tasks, each with a rollout for every reward."""
    return [
        row(f"What is {i} + {i}?", f"{i + i} ({repeat})", reward, index=i, repeat=repeat, **more)
        for i in range(count)
        for repeat, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    ("rows", "objective", "words"),
    [
        (tasks(10, [1.0, 0.0, 0.0, 0.0]), "sft", "10 of 40 rollouts are good: imitating them (10 distinct ones)"),
        (tasks(64, [1.0, 1.0, 0.0]), "dpo", "128 of 192 rollouts are good, and 64 tasks have a good and a bad one"),
        (tasks(63, [1.0, 1.0, 0.0]), "sft", "preferences want at least 64"),
        (tasks(70, [1.0]) + tasks(140, [0.0])[70:], "kto", "only 0 tasks"),
        (tasks(10, [0.0, 0.0]), "sft", "nothing to learn from yet"),
        (tasks(10, [-3.0, 5.0, 19.4]), "sft", "which rollouts are good is not known"),
    ],
)
def test_init_recommends_by_what_is_there(
    tmp_path: Path, rows: list[dict[str, Any]], objective: str, words: str
) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    advice = write_recipe([source], "m", tmp_path / "r.yaml")
    assert advice.objective == objective and words in advice.why
    text = (tmp_path / "r.yaml").read_text()
    assert f"\nobjective: {objective}\n" in text
    assert words in " ".join(text.replace("\n# ", " ").split())


def test_what_init_writes_is_a_recipe_and_so_is_all_that_it_comments_out(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", tasks(10, [1.0, 0.0, 0.0]))
    path = tmp_path / "r.yaml"
    write_recipe([source], "m", path)
    text = path.read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA_NAME}\n")
    check = Draft202012Validator(json.loads((tmp_path / SCHEMA_NAME).read_text()))
    check.validate(yaml.safe_load(text))
    job = open_job(path)
    assert [step.verb for step in job.steps] == ["filter", "format sft", "train sft"]
    assert {key: entry.value for key, entry in read_recipe(path).sections["filter"].items()} == {
        "cap_per_task": 4,
        "validation": 0.1,
    }

    shown = re.sub(r"^# (  .*|validate:|)$", r"\1", text, flags=re.MULTILINE)
    names = "|".join({name for model in SECTIONS.values() for name in model.model_fields})
    shown = re.sub(rf"^  # ({names}):( .+)$", r"  \1:\2", shown, flags=re.MULTILINE)
    check.validate(yaml.safe_load(shown))
    path.write_text(shown)
    every = read_recipe(path)
    for verb in ("filter", "format sft", "train sft", "validate"):
        model = SECTIONS[verb]
        needed = {"model": "m", "baseline": "m"}
        values = {name: entry.value for name, entry in every.sections[verb].items()}
        defaults = model(**{name: needed[name] for name in needed if name in model.model_fields})
        assert len(values) >= 4
        assert model(**{**{n: v for n, v in needed.items() if n in model.model_fields}, **values}) == defaults
        for name in model.model_fields.keys() - {"model"}:
            assert re.search(rf"^(# )?  (# )?{name}:", text, flags=re.MULTILINE), name


def test_names_in_rollouts_stay_in_their_comment(tmp_path: Path) -> None:
    evil = "x\nobjective: dpo\u2028model: evil\x85out: /"
    rows = tasks(4, [1.0, 0.0], agent_ref={"name": evil}) + tasks(4, [-3.0, 5.0, 19.4], agent_ref={"name": "other"})
    for made in rows:
        made["response"]["model"] = evil
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    write_recipe([source], "m: [", tmp_path / "r.yaml")
    keys = {key: entry.value for key, entry in read_recipe(tmp_path / "r.yaml").keys.items()}
    assert keys == {"rollouts": str(source), "model": "m: [", "out": f"runs/{tmp_path.name}", "objective": "sft"}


def test_a_threshold_that_is_not_known_is_asked_for_and_one_task_is_not_divided(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", tasks(1, [-3.0, 5.0, 19.4]))
    write_recipe([source], "m", tmp_path / "r.yaml")
    text = (tmp_path / "r.yaml").read_text()
    assert "IT NEEDS A VALUE HERE: rewards reach from -3 to 19.4" in " ".join(text.replace("\n  # ", " ").split())
    assert "\n  validation: 0.0\n" in text


def test_init_overwrites_nothing_unasked(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", tasks(4, [1.0, 0.0]))
    path = written(tmp_path, "mine")
    with pytest.raises(UserError, match="is there already"):
        write_recipe([source], "m", path)
    assert path.read_text() == "mine"
    write_recipe([source], "m", path, force=True)
    assert "objective: sft" in path.read_text()
    (tmp_path / SCHEMA_NAME).write_text("mine")
    with pytest.raises(UserError, match="no schema of ours"):
        write_recipe([source], "m", tmp_path / "second.yaml")
    assert (tmp_path / SCHEMA_NAME).read_text() == "mine" and not (tmp_path / "second.yaml").exists()
    (tmp_path / SCHEMA_NAME).write_text('{"title": "Recipe of gymtrl"}')
    write_recipe([source], "m", tmp_path / "second.yaml")
    assert json.loads((tmp_path / SCHEMA_NAME).read_text()) == recipe_schema()
    with pytest.raises(UserError, match="is an input"):
        write_recipe([source], "m", source, force=True)
    with pytest.raises(UserError, match="standard input"):
        write_recipe([Path("-")], "m", tmp_path / "other.yaml")
