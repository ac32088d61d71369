"""Where a stage's settings come from: its defaults, the recipe's section, the flags; later ones win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gymtrl.errors import UserError
from gymtrl.workspace.recipe import Recipe, read_value, require_known
from gymtrl.workspace.recipe import nearest as nearest

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """Settings, and for each field where its value came from.

    Attributes:
        settings (`BaseModel`): The validated settings.
        origins (`dict[str, str]`): Field → `default (source)`, `recipe FILE:LINE`, `flag --NAME`, or what the
            caller named.
    """

    settings: S
    origins: dict[str, str]


def resolve(
    model: type[S],
    *,
    section: str,
    recipe: Recipe | None = None,
    given: Mapping[str, tuple[Any, str]] | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> Resolved[S]:
    """Resolves a stage's settings.

    Args:
        model (`type[BaseModel]`): The stage's settings.
        section (`str`): Its section of the recipe: the verb, such as `format sft`.
        recipe (`Recipe`, *optional*): May have a section for the stage, and name the model.
        given (`Mapping[str, tuple[Any, str]]`, *optional*): Field → value and origin, from the stages before; all else
            wins over it.
        flags (`Mapping[str, Any]`, *optional*): Field → value; `None` means not given.
        sets (`Sequence[str]`): `key=value` pairs; the value is read as YAML, a dotted key goes into a mapping.

    Raises:
        UserError: Unknown key (the nearest is named) or bad value.
    """
    values: dict[str, Any] = {}
    origins = {name: _default_origin(model, name) for name in model.model_fields}
    for key, (value, origin) in (given or {}).items():
        values[key], origins[key] = value, origin
    if recipe is not None:
        for key, entry in recipe.settings_of(section, model.model_fields).items():
            values[key], origins[key] = entry.value, recipe.origin(entry)
    for key, value in _pairs(sets):
        head, _, rest = key.partition(".")
        require_known(head, model.model_fields, "--set")
        below = values.get(head) or {}
        if rest and not isinstance(below, dict):
            raise UserError(f"--set {key}: {head} is no mapping but {below!r}", remedy=f"see {origins[head]}")
        values[head] = {**below, rest: value} if rest else value
        origins[head] = "flag --set"
    for key, value in (flags or {}).items():
        if value is not None:
            values[key], origins[key] = value, f"flag --{key.replace('_', '-')}"
    return Resolved(validated(model, values, origins, remedy=f"see 'gymtrl {section} --help'"), origins)


def validated(model: type[S], values: Mapping[str, Any], origins: Mapping[str, str], *, remedy: str) -> S:
    """Makes settings of values.

    Raises:
        UserError: A value is bad or missing; it names where the value came from.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(_explain(error, origins), remedy=remedy) from None


def one_or_more(value: Any) -> Any:
    """Takes one text or path for a list of it, as people write it."""
    return [value] if isinstance(value, str | Path) else value


def _pairs(sets: Sequence[str]) -> list[tuple[str, Any]]:
    pairs = []
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: expected key=value", remedy="for example --set epochs=3")
        try:
            pairs.append((key.strip(), read_value(value)))
        except (yaml.YAMLError, ValueError) as error:
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
