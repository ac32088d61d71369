"""The site: what the reference must hold, and that it builds without a warning. Dead links are warnings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import gymtrl
import gymtrl.serving
from gymtrl.cli.main import VERBS, app
from gymtrl.pipeline.schema import recipe_schema
from gymtrl.pipeline.sections import SECTIONS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def sections(page: str) -> dict[str, str]:
    """What stands below each heading of a page, up to the next."""
    parts = re.split(r"^#+ (.*)\n", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for verb, below in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {verb}", below)


def test_every_flag_of_every_verb_is_in_the_reference() -> None:
    told = sections("cli.md")
    found = dict(commands("gymtrl", get_command(app)))
    assert {f"gymtrl {verb}" for verb in VERBS} <= found.keys()
    for name, command in found.items():
        names = set(re.findall(r"^\| (.*?) \|", told[f"`{name}`"], flags=re.MULTILINE))
        named = {flag for cell in names for flag in re.findall(r"`([^`]+)`", cell)}
        for parameter in command.params:
            flags = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "argument":
                flags = [parameter.metavar or parameter.name]
            assert named >= set(flags), f"{name} {flags}: run python docs/generate.py"
        assert re.sub("['`]", "", command.help) in re.sub("['`]", "", told[f"`{name}`"])


def test_the_reference_tells_types_and_defaults() -> None:
    told = sections("cli.md")
    rows = {row.split(" | ")[0]: row for row in told["`gymtrl filter`"].splitlines() if row.startswith("| `")}
    assert re.search(r"\| integer \| .* \| `4`; RFT, arXiv 2308\.01825", rows["| `--cap-per-task`"])
    assert "| `exact`, `near`, `none` |" in rows["| `--dedup`"]
    assert rows["| `rollouts`"].endswith("| required |")
    assert "| `KEY=VALUE` |" in rows["| `--set`"]


def test_every_key_of_a_recipe_is_in_the_reference() -> None:
    schema, told = recipe_schema(), sections("recipe.md")
    top = told["The keys at the top"]
    for key, shape in schema["properties"].items():
        if key not in SECTIONS:
            assert f"| `{key}` |" in top, key
            continue
        (table,) = (text for title, text in told.items() if f"`{key}`" in title.split(", "))
        (model,) = (one["$ref"].rpartition("/")[2] for one in shape["anyOf"] if "$ref" in one)
        shared = "| key | of |" in table
        for name in schema["$defs"][model]["properties"]:
            rows = [row.split(" | ") for row in table.splitlines() if row.startswith(f"| `{name}` |")]
            of = {kind for row in rows for kind in row[1].split(", ")} if shared else {"all"}
            assert rows and of & {"all", key.partition(" ")[2]}, f"{key}: {name}"


def test_links_of_the_pages_outside_the_site_lead_somewhere() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
        assert all((ROOT / link).exists() for link in links), name


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("sphinx", reason="the site is built where the extra 'docs' is installed: make setup")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--fresh-env"]
    return subprocess.run([*command, str(source), str(out)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_every_page_is_built_and_searched(site: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    assert len(pages) > 20
    index = (site / "searchindex.js").read_text()
    for page in pages:
        assert (site / page).with_suffix(".html").is_file()
        assert f'"{page}"' in index


def test_the_tutorial_keeps_its_label(site: Path) -> None:
    assert 'id="tutorial-train-with-trl"' in (site / "tutorial.html").read_text()


def test_every_public_name_of_python_is_told(site: Path) -> None:
    page = (site / "python.html").read_text()
    for module in (gymtrl, gymtrl.serving):
        missing = [name for name in module.__all__ if f'id="{module.__name__}.{name}"' not in page]
        assert not missing, "docs/python.md names what is told"
    settings = [getattr(gymtrl, name) for name in gymtrl.__all__ if name.endswith("Settings")]
    fields = {name for model in settings for name in model.model_fields}
    assert len(fields) > 80
    assert not [name for name in fields if f"<strong>{name}</strong>" not in page]


def test_docstrings_are_shown_as_they_are_meant(site: Path) -> None:
    page = (site / "python.html").read_text()
    assert "system-message" not in page and " -- " not in page
    assert 'href="#gymtrl.FilterSettings"' in page, "types link to their records"


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert not [one for one in loads if re.match(r"(https?:)?//", one)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style.name


DEAD = {
    "a page": "[words](nowhere.md)",
    "a heading of this page": "[words](#nowhere)",
    "a heading of another page": "[words](other.md#nowhere)",
    "a label": "{ref}`words <nowhere>`",
    "a picture": "![words](nowhere.svg)",
    "a page of the tree": "```{toctree}\nnowhere\n```",
}


def test_dead_links_fail(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "_static", tmp_path / "_static")
    shutil.copy(DOCS / "conf.py", tmp_path)
    (tmp_path / "index.md").write_text("# One\n\n[words](other.md#there)\n\n```{toctree}\nother\n```\n")
    (tmp_path / "other.md").write_text("# Two\n\n## There\n")
    assert build(tmp_path, tmp_path / "_build").returncode == 0
    with (tmp_path / "index.md").open("a") as page:
        page.write("".join(f"\n{link}\n" for link in DEAD.values()))
    done = build(tmp_path, tmp_path / "_build")
    assert done.returncode == 1
    text = (tmp_path / "index.md").read_text()
    lines = {text[: text.index(link)].count("\n") + 1 for link in DEAD.values()}
    assert {int(number) for number in re.findall(r"index\.md:(\d+): WARNING", done.stderr)} == lines, done.stderr
