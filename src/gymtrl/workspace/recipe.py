"""Recipes: one YAML file with a section per stage, read so that every complaint names the line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from gymtrl.errors import UserError

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Reads numbers such as 1e-5 as well, which PyYAML takes for text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


@dataclass(frozen=True)
class Entry:
    """A value of a recipe, and the line that its key stands in."""

    value: Any
    line: int


@dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Attributes:
        path (`Path`): The file.
        keys (`dict[str, Entry]`): What it says of the whole job.
        sections (`dict[str, dict[str, Entry]]`): The settings of each stage that it has a section for.
    """

    path: Path
    keys: Mapping[str, Entry]
    sections: Mapping[str, Mapping[str, Entry]]

    def settings_of(self, section: str, fields: Iterable[str]) -> dict[str, Entry]:
        """The settings of a stage; its `model` is that of the whole job unless the section names one."""
        model = self.keys.get("model")
        shared = {"model": model} if model is not None and model.value is not None and "model" in fields else {}
        return {**shared, **self.sections.get(section, {})}

    def origin(self, entry: Entry) -> str:
        """Where a value came from."""
        return f"recipe {self.path}:{entry.line}"


def read_recipe(path: Path, sections: Mapping[str, type[BaseModel]], job: type[BaseModel]) -> Recipe:
    """Reads a recipe and refuses what no stage knows.

    Args:
        path (`Path`): A YAML file; an empty one is a recipe that changes nothing.
        sections (`Mapping[str, type[BaseModel]]`): The settings of each stage that may have a section.
        job (`type[BaseModel]`): The keys beside the sections, which are about the whole job.

    Returns:
        `Recipe`: With values as YAML gives them; the stages check them.

    Raises:
        UserError: The file is missing or no YAML, a key is unknown (the nearest is named) or there twice, or a section
            is no mapping.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        keys: dict[str, Entry] = {}
        found: dict[str, dict[str, Entry]] = {}
        if root is None:
            return Recipe(path, keys, found)
        _refuse_doubles(path, root, set())
        names = [*job.model_fields, *sections]
        for key, value in _pairs(path, root, "a section per stage, such as 'filter:'", names):
            if key.value in sections:
                found[key.value] = _section(path, loader, key, value, sections[key.value])
            else:
                keys[key.value] = _entry(loader, key, value)
        return Recipe(path, keys, found)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", remedy="give the path of a recipe (YAML)") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem}", remedy="mend that line") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML: {error}", remedy="mend what it names") from None


def read_value(text: str) -> Any:
    """Reads one value as a recipe would.

    Raises:
        yaml.YAMLError: It is no YAML. ValueError: It is no date, though it looks like one.
    """
    return yaml.load(text, _Loader)


def nearest(key: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known key nearest to `key`, `""` where none is near."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def require_known(key: str, known: Iterable[str], where: str) -> None:
    """Refuses a key that nobody knows.

    Raises:
        UserError: Naming the nearest key that is known.
    """
    names = list(known)
    if key not in names:
        raise UserError(f"{where}: unknown key '{key}'{nearest(key, names)}", remedy=f"known: {', '.join(names)}")


def _section(path: Path, loader: _Loader, key: yaml.Node, value: yaml.Node, model: type[BaseModel]) -> dict[str, Entry]:
    if isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null":
        return {}
    _refuse_unknown(path, value, model, key.value)
    return {inner.value: _entry(loader, inner, below) for inner, below in value.value}


def _refuse_unknown(path: Path, node: yaml.Node, model: type[BaseModel], where: str) -> None:
    """Refuses unknown settings, also of settings within settings; mappings for other programs are theirs to check."""
    for key, value in _pairs(path, node, f"settings by name below '{where}:'", model.model_fields, where):
        annotation = model.model_fields[key.value].annotation
        inner = next((k for k in (annotation, *get_args(annotation)) if _is_settings(k)), None)
        if inner is not None and isinstance(value, yaml.MappingNode):
            _refuse_unknown(path, value, inner, f"{where}: {key.value}")


def _pairs(
    path: Path, node: yaml.Node, expected: str, known: Iterable[str], where: str = ""
) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{_line(node)}: expected {expected}", remedy="see docs/recipe.md")
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "…"
        require_known(name, known, f"{path}:{_line(key)}" + (f": section '{where}'" if where else ""))
        yield key, value


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _refuse_doubles(path: Path, node: yaml.Node, seen: set[int]) -> None:
    """Refuses a key that a mapping has twice, of which YAML would keep the last without a word."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubles(path, item, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    there = f"the key '{key.value}' is in line {first[key.value]} already"
                    raise UserError(f"{path}:{_line(key)}: {there}", remedy="leave one of the two out")
                first[key.value] = _line(key)
            _refuse_doubles(path, value, seen)


def _entry(loader: _Loader, key: yaml.Node, value: yaml.Node) -> Entry:
    return Entry(loader.construct_object(value, deep=True), _line(key))


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1
