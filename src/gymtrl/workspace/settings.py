"""Where a stage's settings come from: its defaults, the recipe's section, the flags; later ones win."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gymtrl.errors import UserError

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, and for each field where its value came from.

    Attributes:
        settings (`BaseModel`): The validated settings.
        origins (`dict[str, str]`): Field → `default (source)`, `recipe FILE` or `flag`.
    """

    settings: S
    origins: dict[str, str]


def resolve(
    model: type[S],
    *,
    section: str,
    recipe: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Resolved[S]:
    """Resolves a stage's settings.

    Args:
        model (`type[BaseModel]`): The stage's settings.
        section (`str`): Its section of the recipe: the verb, such as `format sft`.
        recipe (`Path`, *optional*): YAML file with a section per stage.
        flags (`Mapping[str, Any]`, *optional*): Field → value; `None` means not given.
        sets (`Sequence[str]`): `key=value` pairs; the value is read as YAML, a dotted key goes into a mapping.

    Raises:
        UserError: Unknown key (the nearest is named), bad value, unreadable recipe.
    """
    values: dict[str, Any] = {}
    origins = {name: _default_origin(model, name) for name in model.model_fields}
    if recipe is not None:
        for name, value in recipe_section(recipe, section).items():
            key = str(name)
            _known(key, model.model_fields, f"{recipe}: section '{section}'")
            values[key], origins[key] = value, f"recipe {recipe}"
    for key, value in _pairs(sets):
        head, _, rest = key.partition(".")
        _known(head, model.model_fields, "--set")
        below = values.get(head) or {}
        if rest and not isinstance(below, dict):
            raise UserError(f"--set {key}: {head} is no mapping but {below!r}", remedy=f"see {origins[head]}")
        values[head] = {**below, rest: value} if rest else value
        origins[head] = "flag --set"
    for key, value in (flags or {}).items():
        if value is not None:
            values[key], origins[key] = value, f"flag --{key.replace('_', '-')}"
    try:
        return Resolved(model(**values), origins)
    except ValidationError as error:
        raise UserError(_explain(error, origins), remedy=f"see 'gymtrl {section} --help'") from None


def recipe_section(recipe: Path, section: str) -> dict[str, Any]:
    """Returns one section of a recipe, `{}` where the recipe has none.

    Raises:
        UserError: The file is missing, no YAML, or no mapping of stages.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{recipe}: {error.strerror}", remedy="give the path of a recipe (YAML)") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: not YAML: {error}", remedy="mend the line that it names") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(v, dict | None) for v in content.values()):
        raise UserError(f"{recipe}: expected a section per stage, such as 'filter:'", remedy="see the README's recipe")
    for key in content:
        _known(str(key), STAGES, str(recipe))
    return content.get(section) or {}


STAGES = ("filter", "format sft", "train sft", "validate", "compare", "gym setup")
"""Stages that a recipe can hold a section for."""


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known key nearest to `key`, `""` where none is near."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _known(key: str, known: Iterable[str], where: str) -> None:
    names = list(known)
    if key not in names:
        raise UserError(f"{where}: unknown key '{key}'{nearest(key, names)}", remedy=f"known: {', '.join(names)}")


def _pairs(sets: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: expected key=value", remedy="for example --set epochs=3")
        try:
            pairs.append((key.strip(), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise UserError(f"--set {item}: {error}", remedy="the value is read as YAML") from None
    return pairs


def _default_origin(model: type[BaseModel], name: str) -> str:
    extra = model.model_fields[name].json_schema_extra
    source = extra.get("source") if isinstance(extra, dict) else None
    return f"default ({source})" if source else "default"


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    parts = []
    for problem in error.errors(include_url=False, include_context=False):
        name = ".".join(str(p) for p in problem["loc"])
        if problem["type"] == "missing":
            parts.append(f"{name} is required")
        elif not name:  # of several settings together
            parts.append(problem["msg"].removeprefix("Value error, "))
        else:
            parts.append(f"{name} = {problem['input']!r} ({origins.get(name.split('.')[0], '?')}): {problem['msg']}")
    return "; ".join(parts)
