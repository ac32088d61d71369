"""The tutorial and the how-to pages run from top to bottom, each in a fresh folder, and print what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks import blocks

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in (DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))) if blocks(page)]


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_and_prints_what_it_shows(
    gym_site_packages: Path, smollm2_tools_dir: Path, tmp_path: Path, page: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tools").symlink_to(smollm2_tools_dir)
    for block in blocks(page):
        done = block.run(tmp_path, {"SITE": str(gym_site_packages)})
        assert done.returncode == 0, f"{block.code}\nends with status {done.returncode}\n{done.stdout}{done.stderr}"
        assert block.agrees(done.stdout), f"{block.code}\nprints\n{done.stdout}"
