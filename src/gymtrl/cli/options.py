"""Options of a stage, made from its settings model, and what all stages have in common on the command line."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from gymtrl.pipeline.sections import read_recipe
from gymtrl.workspace.settings import Resolved, resolve
from gymtrl.workspace.stage import job_folder

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to write; runs/<name>/<stage> if not given.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Rollouts = Annotated[
    list[Path], typer.Argument(help="Rollout files (JSONL), or folders of them; '-' reads standard input.")
]


@dataclass(frozen=True)
class Stage:
    """What a verb gets beside its own arguments.

    Attributes:
        settings (`BaseModel`): The resolved settings.
        json (`bool`): The user wants JSON.
    """

    settings: Any
    json: bool


def stage_options(
    model: type[BaseModel], section: str, *, preview: Callable[..., None] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb one option per setting, and `--recipe`, `--set`, `--json` and `--dry-run`.

    The verb receives its own arguments and `stage: Stage`. With `--dry-run` it is not called: the resolved settings are
    printed, each with where it came from; a verb that can say more does so in `preview`, which receives the resolved
    settings, `as_json` and the verb's own arguments.
    """
    fields = [p for p in (_parameter(n, f) for n, f in model.model_fields.items()) if p]

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(annotation=get_type_hints(verb, include_extras=True)[name])
            for name, parameter in inspect.signature(verb).parameters.items()
            if name != "stage"
        ]

        @functools.wraps(verb)
        def command(**arguments: Any) -> None:
            # A list option that is not given comes as an empty list.
            flags = {p.name: None if (value := arguments.pop(p.name)) == [] else value for p in fields}
            recipe, sets, as_json, dry_run = (arguments.pop(n) for n in ("recipe", "sets", "as_json", "dry_run"))
            read = read_recipe(recipe) if recipe is not None else None
            resolved = resolve(model, section=section, recipe=read, flags=flags, sets=sets or ())
            if dry_run and preview is not None:
                preview(resolved, as_json=as_json, **arguments)
            elif dry_run:
                print_resolved(resolved, as_json=as_json)
            else:
                verb(**arguments, stage=Stage(resolved.settings, as_json))

        command.__signature__ = inspect.Signature([*own, *fields, *_COMMON])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *fields, *_COMMON)}
        return command

    return decorate


def resolved_values(resolved: Resolved[Any]) -> dict[str, dict[str, Any]]:
    """Each setting's value and origin."""
    values = resolved.settings.model_dump(mode="json")
    return {name: {"value": value, "origin": resolved.origins[name]} for name, value in values.items()}


def print_resolved(resolved: Resolved[Any], *, as_json: bool) -> None:
    """Prints each setting's value and origin."""
    values = resolved_values(resolved)
    if as_json:
        import json

        print(json.dumps(values, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("setting", "value", "origin", box=None)
    for name, setting in values.items():
        table.add_row(name, escape(str(setting["value"])), escape(setting["origin"]))
    Console().print(table)


def default_out(inputs: Sequence[Path], stage: str) -> Path:
    """Returns where a stage writes without `-o`: beside the stage before, else `runs/<name of the input>/<stage>`."""
    first = inputs[0]
    if (first / "manifest.json").is_file():
        return first.parent / stage
    return job_folder(first) / stage


_RECIPE = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with a section per stage.", show_default=False)
]
_SETS = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any setting; may be repeated.", show_default=False),
]
_DRY = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the resolved settings and their origins, and what else is known beforehand."),
]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_COMMON = [
    inspect.Parameter("recipe", _KEYWORD, annotation=_RECIPE, default=None),
    inspect.Parameter("sets", _KEYWORD, annotation=_SETS, default=None),
    inspect.Parameter("as_json", _KEYWORD, annotation=Json, default=False),
    inspect.Parameter("dry_run", _KEYWORD, annotation=_DRY, default=False),
]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter | None:
    """One option; `None` for mappings, which are set from the recipe or with `--set key.sub=value`."""
    kind = _option_kind(field)
    if get_origin(kind) is dict:
        return None
    flag = "--" + name.replace("_", "-")
    also = field.json_schema_extra.get("flags", ()) if isinstance(field.json_schema_extra, dict) else ()
    declared = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *map(str, also)]  # type: ignore[arg-type]
    option = typer.Option(*declared, help=f"{field.description} {_default_text(field)}".strip(), show_default=False)
    return inspect.Parameter(name, _KEYWORD, annotation=Annotated[kind | None, option], default=None)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def _option_kind(field: FieldInfo) -> Any:
    """What one word on the command line is; some settings read their word themselves, such as `0.1-0.9`."""
    kind = _without_none(field.annotation)
    metadata = [*field.metadata]
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata += more
    return str if any(isinstance(part, BeforeValidator) for part in metadata) else kind


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "[required]"
    default = field.get_default(call_default_factory=True)
    source = field.json_schema_extra.get("source") if isinstance(field.json_schema_extra, dict) else None
    if default is None or default == {}:
        return f"[{source}]" if source else ""
    return f"[default: {default}; {source}]" if source else f"[default: {default}]"
