"""The reference of the command line, made from what `--help` tells of each verb."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from typer.main import get_command

from gymtrl.cli.main import app

Table = Callable[[tuple[str, ...], list[tuple[str, ...]]], str]

_TYPES = {
    "str": "text",
    "int": "integer",
    "int range": "integer",
    "float": "number",
    "float range": "number",
    "list[Path]": "paths",
    "list[str]": "texts",
}
_HELP = re.compile(r"(?P<words>.*?)(?:\s+\[(?P<default>.*)\])?", re.DOTALL)


def command_line(table: Table) -> str:
    """A section for each verb, with its arguments and flags.

    Args:
        table (`Callable`): Makes a Markdown table of a head and rows.
    """
    return "\n".join(_section(path, command, table) for path, command in _below("gymtrl", get_command(app)))


def _below(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command and those that it holds, each with the words that call it."""
    yield path, command
    held = getattr(command, "commands", {})
    for name in command.list_commands(None) if held else ():
        yield from _below(f"{path} {name}", held[name])


def _section(path: str, command: Any, table: Table) -> str:
    context = command.context_class(command, info_name=path)
    usage = " ".join((path, *command.collect_usage_pieces(context)))
    # The verbs of a group stand below it, the groups and all others below the program.
    level = max(2, path.count(" ") + 1)
    parts = [f"{'#' * level} `{path}`\n", f"{_words(command.help)}\n", f"    {usage}\n"]
    for kind, head in (
        ("argument", ("argument", "type", "what it is", "default")),
        ("option", ("flag", "type", "what it does", "default")),
    ):
        rows = [_row(one, context) for one in command.params if one.param_type_name == kind]
        if rows:
            parts.append(table(head, rows))
    return "\n".join(parts)


def _row(parameter: Any, context: Any) -> tuple[str, ...]:
    _, text = parameter.get_help_record(context)
    told = _HELP.fullmatch(text)
    assert told is not None
    value, _, source = (told["default"] or "").removeprefix("default: ").partition("; ")
    default = f"`{value}`" if "[default: " in text else _words(value)
    return (
        ", ".join(f"`{name}`" for name in _names(parameter)),
        _type(parameter, context),
        _words(told["words"]),
        "; ".join(part for part in (default, _words(source)) if part),
    )


def _names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.metavar or parameter.name]
    return [*parameter.opts, *parameter.secondary_opts]


def _type(parameter: Any, context: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.metavar and parameter.param_type_name == "option":
        return f"`{parameter.metavar}`"
    kind = parameter.display_type(context).strip("<>")
    return ", ".join(f"`{one}`" for one in kind.split("|")) if "|" in kind else _TYPES.get(kind, kind)


def _words(text: str) -> str:
    """Words for Markdown: commands and flags as code, and nothing that looks like a tag."""
    text = re.sub(r"'(gymtrl [^']+)'|(--[a-z][a-z-]+)", lambda found: f"`{found[1] or found[2]}`", text)
    return re.sub(r"(?<!`)<([a-z]+)>", r"\\<\1>", text)
