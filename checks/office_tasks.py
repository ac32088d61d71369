"""Tasks with tool calls for Gym's workplace_assistant: delete one e-mail, or one project task, by its number.

Easy enough that a model of 135 M parameters, shown two worked requests, sometimes makes the right call. Gym scores what
the calls leave in its mailbox and project board.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

AGENT = "workplace_assistant_simple_agent"


class Kind(NamedTuple):
    """What is deleted: the word for it, the tool, its argument, and the file of records with that column."""

    word: str
    tool: str
    argument: str
    records: str


KINDS = (
    Kind("email", "email_delete_email", "email_id", "emails.csv"),
    Kind("task", "project_management_delete_task", "task_id", "project_tasks.csv"),
)
_WORKED = ("00000911", "00000623")  # numbers that no record has


def office_tasks(site_packages: Path, each: int) -> list[dict[str, Any]]:
    """Returns Gym input rows, `each` for every kind of record.

    Args:
        site_packages (`Path`): Of Gym's environment: the records and the tools' descriptions come from there.
        each (`int`): Records of each kind.
    """
    server = site_packages / "resources_servers" / "workplace_assistant"
    with (server / "data" / "example.jsonl").open() as lines:
        described = {tool["name"]: tool for tool in json.loads(next(lines))["responses_create_params"]["tools"]}
    tools = [described[kind.tool] for kind in KINDS]
    worked = [item for index, kind in enumerate(KINDS) for item in _worked_request(kind, _WORKED[index])]
    return [
        _task_row(kind, number, tools, worked)
        for kind in KINDS
        for number in _numbers(server / "csv_data" / "processed" / kind.records, kind.argument)[:each]
    ]


def _numbers(records: Path, column: str) -> list[str]:
    with records.open(newline="") as file:
        return sorted({row[column] for row in csv.DictReader(file)})


def _worked_request(kind: Kind, number: str) -> list[dict[str, Any]]:
    call = {"call_id": f"worked_{kind.word}", "name": kind.tool, "arguments": json.dumps({kind.argument: number})}
    output = json.dumps({"output": f"{kind.word.capitalize()} deleted successfully."})
    return [
        _request(kind, number),
        {"type": "function_call", **call},
        {"type": "function_call_output", "call_id": call["call_id"], "output": output},
        {"role": "assistant", "content": "Done."},
    ]


def _request(kind: Kind, number: str) -> dict[str, str]:
    return {"role": "user", "content": f"Delete {kind.word} {number}."}


def _task_row(kind: Kind, number: str, tools: list[dict[str, Any]], worked: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "responses_create_params": {
            "input": [*worked, _request(kind, number)],
            "tools": tools,
            "parallel_tool_calls": False,
        },
        "id": int(number),
        "ground_truth": [{"name": kind.tool, "arguments": json.dumps({kind.argument: number})}],
        "category": f"workplace_assistant_{kind.word}",
        "environment_name": "workplace_assistant",
        "metadata": {"twin": f"{kind.word} {number}"},
        "agent_ref": {"name": AGENT},
    }
