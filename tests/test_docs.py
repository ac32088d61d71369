"""The pages under docs/ hold what they say: generated parts are the code's, commands run and print what is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from blocks import Block, blocks, filled
from gymtrl.formats.masks import NOT_PRESERVING
from gymtrl.formats.preference import _DIFFERS, _NO_PAIR
from gymtrl.formats.reasons import DROPS
from gymtrl.pipeline.sections import SECTIONS, JobSettings
from gymtrl.rollouts.columns import COLUMNS
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.reasons import FAULTS, FLAGS, REASONS, remedy_for
from gymtrl.rollouts.record import VerdictKind
from gymtrl.rollouts.table import SCHEMA, rollout_table
from gymtrl.training.objectives import OBJECTIVES as TRAINED
from rows import row
from test_conformance import expected_verdicts

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("verdicts.md", "filter.md", "formats.md", "recipe.md", "training.md", "scale.md", "compare.md")
SOURCE = DOCS.parent / "src" / "gymtrl"

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
THOUGHT = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
TOOL = {"type": "function", "name": "f", "description": "", "parameters": {}}


def call(call_id: str | None = "c", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "name": "f", "call_id": call_id, "arguments": arguments}


def result(call_id: str = "c") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "r"}


def chat(*output: Any, tools: list[Any] | None = None, **request: Any) -> dict[str, Any]:
    """A rollout with this output and these fields of the request."""
    made = row("q", "a", 1.0)
    made["responses_create_params"] |= {"tools": [TOOL] if tools is None else tools} | request
    made["response"]["output"] = list(output)
    return made


def counted(tokens: int) -> dict[str, Any]:
    made = chat(SAID)
    made["response"]["usage"] = {"input_tokens": tokens, "output_tokens": 1}
    return made


LINES: dict[str, Any] = {
    "tools_undeclared": chat(call(), result(), SAID, tools=[]),
    "hidden_context": counted(100_000),
    "malformed_json": '{"cut',
    "not_object": "[1]",
    "line_too_long": row("q", "a" * 200_000, 1.0),
    "failure_row": row("q", "a", 0.0, _ng_failure_class="timeout"),
    "task_only": {"responses_create_params": {"input": [USER]}},
    "custom_record": {"question": "q"},
    "episode_result": {"_ng_result_type": "episode"},
    "empty_output": chat(),
    "noncumulative_transitions": chat([SAID], [THOUGHT, SAID]),
    "unsupported_modality_audio": chat(SAID, metadata={"audio_url": "u"}),
    "no_prompt": chat(SAID, input=[]),
    "no_assistant_turn": chat(USER),
    "unsupported_item_type": chat({"type": "web_search_call"}, SAID),
    "unsupported_content_part": chat(SAID, input=[{"role": "user", "content": [{"type": "input_file"}]}]),
    "refusal_part": chat({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}),
    "missing_call_id": chat(call(None), SAID),
    "duplicate_call_id": chat(call(), result(), call(), SAID),
    "bad_tool_arguments": chat(call(arguments="[]"), result(), SAID),
    "orphan_tool_output": chat(result("other"), SAID),
    "duplicate_tool_output": chat(call(), result(), result(), SAID),
    "missing_tool_output": chat(call("b"), call(), result(), SAID),
    "ambiguous_turns": chat(SAID, SAID),
    "empty_assistant": chat(SAID, USER, {"role": "assistant", "content": ""}),
    "roundtrip_mismatch": chat({"role": "assistant", "content": "\ud800"}),
    "materialized_input": {"responses_create_params": {"input": [USER]}, "_ng_rollout_index": 0},
    "reward_profile": {"mean/reward": 0.5, "responses_create_params": {"input": [USER]}},
}
"""A line for each reason."""

FAULTY = {
    "ends_in_reasoning": chat(THOUGHT),
    "unbalanced_think": chat({"role": "assistant", "content": "<think>a<think>b</think>c"}),
}
FLAGGED = {
    "cluster_missing": chat(SAID),
    "developer_role": chat(SAID, input=[{"role": "developer", "content": "d"}, USER]),
    "prompt_differs": row("another question", "a", 1.0),
    "reasoning_hidden": chat({"type": "reasoning", "summary": []}, SAID),
    "reward_not_a_number": chat(SAID) | {"reward": "much"},
    "think_in_content": chat({"role": "assistant", "content": "<think>a</think>b"}),
    "token_ids_partial": chat({**SAID, "prompt_token_ids": [1], "generation_token_ids": [2]}),
    "tool_not_function": chat(SAID, tools=[{"type": "web_search"}]),
}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_generated_part_stands_in_a_page() -> None:
    text = "".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    parts = re.findall(r"<!-- generated: ([a-z]+) -->", text)
    expected = ["context", "reject", "skip", "faults", "flags", "columns", "rules", "settings", "templates", "refusals"]
    expected += ["formatcolumns", "formatsettings", "rowdrops", "choicedrops", "jobkeys", "recipesections", "doctor"]
    expected += ["defaults", "comparesettings", "worse", "commandline", "filterparameters", "keyoptions", "gpuplan"]
    assert sorted(parts) == sorted(expected)
    assert text.count("<!-- end -->") == len(parts)
    assert all(f"| `{name}` |" in text for name in (*REASONS, *FAULTS, *FLAGS, *SCHEMA))
    recipe = (DOCS / "recipe.md").read_text()
    assert all(f"| `{name}` |" in recipe for model in (JobSettings, *SECTIONS.values()) for name in model.model_fields)


def test_the_notebook_has_what_runs_on_the_page_as_its_cells() -> None:
    made = json.loads((DOCS / "tutorial.ipynb").read_text())
    cells = [cell for cell in made["cells"] if cell["cell_type"] == "code"]
    ran = blocks(DOCS / "tutorial.md")
    assert ["".join(cell["source"]).removeprefix("%%bash -eu\n") + "\n" for cell in cells] == [one.code for one in ran]
    shown = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]
    assert shown == [one.shown for one in ran]
    words = "".join("".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "markdown")
    assert "## Step 6: Validate with Gym" in words
    assert not re.search(r"^:::|<!--|^:sync", words, flags=re.MULTILINE)


def test_every_judgement_of_ours_has_its_reason() -> None:
    table, reasons = (DOCS / "defaults.md").read_text().split("## What is our judgement")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    ours = {row[0].strip("| `") for row in rows if re.search(r"\bours\b|measured", row[-1])}
    assert {"learning_rate", "effective_batch", "micro_batch", "stop_kl"} <= ours
    assert ours <= set(re.findall(r"^- `(\w+)`", reasons, flags=re.MULTILINE))


def test_every_default_of_training_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \|", (DOCS / "defaults.md").read_text(), flags=re.MULTILINE)
    told = {(name, one) for name, of in rows for one in (TRAINED if of == "all" else of.split(", "))}
    assert told == {(name, key) for key, one in TRAINED.items() for name in one.settings.model_fields}


def test_every_flag_of_a_setting_is_named() -> None:
    assert "| `--validation`, `--split` |" in (DOCS / "filter.md").read_text()


def test_a_stale_part_is_found_and_mended(tmp_path: Path) -> None:
    for name in ("generate.py", "command_line.py", "notebook.py", "verdicts.md"):
        (tmp_path / name).write_text((DOCS / name).read_text())
    page = tmp_path / "verdicts.md"
    page.write_text(page.read_text().replace("| `malformed_json` |", "| `broken` |"))
    command = [sys.executable, str(tmp_path / "generate.py")]
    assert subprocess.run([*command, "--check"], stdout=subprocess.DEVNULL).returncode == 1
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert page.read_text() == (DOCS / "verdicts.md").read_text()


@pytest.mark.parametrize("reason", LINES)
def test_each_reason_arises_with_the_verdict_that_is_described(tmp_path: Path, reason: str) -> None:
    (line,) = read_lines([written(tmp_path / "rollouts.jsonl", LINES[reason])], max_line_bytes=100_000)
    assert (line.verdict, line.reason.partition(":")[0]) == (REASONS[reason].kind, reason), line.detail
    assert remedy_for(line.verdict, line.reason) == REASONS[reason].remedy


def test_no_reason_is_described_that_cannot_arise() -> None:
    assert LINES.keys() == REASONS.keys()


def test_every_reason_in_the_shipped_files_is_described() -> None:
    told = {verdict for verdicts in expected_verdicts().values() for verdict in verdicts} - {"ok"}
    assert {verdict.split(":")[1] for verdict in told} <= REASONS.keys()
    assert all(REASONS[reason].kind == kind for kind, reason, *_ in (verdict.split(":") for verdict in told))


def test_each_record_says_what_it_must() -> None:
    kinds = set(get_args(VerdictKind)) - {"ok"}
    assert {reason.kind for reason in REASONS.values()} == kinds
    sentences = [text for reason in REASONS.values() for text in (reason.meaning, reason.remedy)]
    sentences += [*FAULTS.values(), *FLAGS.values(), *(column.words for column in COLUMNS)]
    assert all(text[-1] == "." and text[0] in "`<" + text[0].upper() for text in sentences)


@pytest.mark.parametrize("fault", FAULTY)
def test_each_fault_arises(tmp_path: Path, fault: str) -> None:
    table = rollout_table(read_lines([written(tmp_path / "rollouts.jsonl", FAULTY[fault])]))
    assert table["fault"].to_list() == [fault]


@pytest.mark.parametrize("flag", FLAGGED)
def test_each_flag_arises(tmp_path: Path, flag: str) -> None:
    path = written(tmp_path / "rollouts.jsonl", row("q", "a", 1.0, group="g"), FLAGGED[flag])
    table = rollout_table(read_lines([path], cluster="group" if flag == "cluster_missing" else None))
    assert table["verdict"].to_list() == ["ok", "ok"]
    assert flag in table["flags"].to_list()[1]


def test_all_faults_and_flags_are_tried() -> None:
    assert (FAULTY.keys(), FLAGGED.keys()) == (FAULTS.keys(), FLAGS.keys())


def test_every_reason_to_drop_a_line_is_described() -> None:
    formats = "".join(path.read_text() for path in (SOURCE / "formats").glob("*.py"))
    choices = ("pairs", "labels", "unpaired", "prompts", "rollout_groups")
    chosen = "".join((SOURCE / "selection" / f"{name}.py").read_text() for name in choices)
    raised = set(re.findall(r'Refusal\(\s*"([a-z_]+)"', formats)) | {NOT_PRESERVING, *_NO_PAIR, _DIFFERS}
    # Recorded ids that do not fit are not used; the row is rendered instead.
    raised = {reason for reason in raised if not reason.startswith("recorded_")}
    raised |= set(re.findall(r'(?:lit|fill_null)\("([a-z_]+)"\)', chosen))
    assert raised == DROPS.keys()


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page == "training.md" else page for page in PAGES]
)
def test_commands_of_a_page_run_and_show_what_it_says(
    gym_site_packages: Path, smollm2_tools_dir: Path, tmp_path: Path, page: str
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tools").symlink_to(smollm2_tools_dir)
    ran = blocks(DOCS / page)
    assert ran
    for block in ran:
        done = block.run(tmp_path, {"SITE": str(gym_site_packages)})
        # Progress is told in lines where there is no terminal, before it what a run will do, after it where a page is.
        told = re.sub(
            r"^(  (rows|seen|cause|remedy): .*|(plan|note|warning): .*|→ .*|step \d+/\d+  loss .*)\n",
            "",
            done.stderr,
            flags=re.MULTILINE,
        )
        assert (done.returncode, told) == (0, ""), block.code
        assert block.agrees(done.stdout), f"{block.code}\nprints\n{done.stdout}"


def test_output_that_varies_is_compared_but_for_its_numbers(tmp_path: Path) -> None:
    page = written(tmp_path / "page.md", "```sh\nls\n```\n\n<!-- varies -->\n```text\nkept  9 of 12\n…\nend\n```")
    (block,) = blocks(page)
    assert all(block.agrees(text) for text in ("kept 9 of 12\nend\n", "kept   10 of 1,200.5\na\nb\nend\n"))
    assert not any(block.agrees(text) for text in ("kept 9 of\nend\n", "left 9 of 12\nend\n", "kept 9 of 12\nend\na\n"))
    exact = Block("sh", "ls", "kept  9\n", varies=False)
    assert exact.agrees("kept  9 \n")
    assert not exact.agrees("kept  10\n")


def test_what_blocks_print_is_put_into_their_page() -> None:
    page = "".join(
        f"```sh\n{name}\n```\n\n```text\n{shown}\n```\n\n" for name, shown in [("a", "…"), ("b", "2"), ("c", "3")]
    )
    assert filled(page, {"a\n": "1  \n", "b\n": "2\n"}) == page.replace("…", "1")
    assert filled(page, {"c\n": "4\n5\n"}) == page.replace("3", "4\n5")


def test_readme_links_the_pages() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    assert all(f"(docs/{page})" in readme for page in (*PAGES, "defaults.md", "doctor.md", "learning.md"))
