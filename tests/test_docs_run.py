"""The tutorial and the how-to pages run from top to bottom, each in a fresh folder, and print what they show.

The tutorial runs as its notebook, whose cells are the blocks of the page. What needs a GPU, a key or an installation is
no such block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from blocks import blocks, environment

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted((DOCS / "how-to").glob("*.md")) if blocks(page)]


@pytest.fixture
def folder(smollm2_tools_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """A fresh folder with the small model that knows tools; what still runs in it at the end is stopped."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tools").symlink_to(smollm2_tools_dir)
    yield tmp_path
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(tmp_path):
                process.kill()
        except psutil.Error:
            continue


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_and_prints_what_it_shows(gym_site_packages: Path, folder: Path, page: Path) -> None:
    for block in blocks(page):
        done = block.run(folder, {"SITE": str(gym_site_packages)})
        assert done.returncode == 0, f"{block.code}\nends with status {done.returncode}\n{done.stdout}{done.stderr}"
        assert block.agrees(done.stdout), f"{block.code}\nprints\n{done.stdout}"


@pytest.mark.long
def test_the_tutorial_runs_as_a_notebook(gym_site_packages: Path, folder: Path) -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment())
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for block, cell in zip(blocks(DOCS / "tutorial.md"), cells, strict=True):
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        assert block.agrees(printed), f"{block.code}\nprints\n{printed}"
