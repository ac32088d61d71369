"""The README holds what it says: its example is the tested one, its verbs exist, its second section runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gymtrl.cli.main import VERBS
from gymtrl.workspace.artefact import read_manifest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SERVERS = ("workplace_assistant", "math_advanced_calculations", "mcqa")


def test_python_example_is_the_tested_script() -> None:
    script = (ROOT / "examples" / "job.py").read_text().split('"""')[2].strip()
    assert f"```python\n{script}\n```" in README


def test_every_verb_is_described() -> None:
    described = set(re.findall(r"^\| `(.*)` \|", README, flags=re.MULTILINE))
    names = {name.split()[0] for group in described for name in group.replace("`", "").split(", ")}
    assert set(VERBS) <= names


def test_make_targets_exist() -> None:
    made = set(re.findall(r"^([a-z][a-z0-9.-]*[a-z0-9]):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"make ([a-z][a-z0-9.-]*[a-z0-9])", README))
    assert named <= made and made <= named | {"setup", "clean"}


@pytest.mark.slow
def test_second_section_on_shipped_files(gym_site_packages: Path, smollm2_tools_dir: Path, tmp_path: Path) -> None:
    (block,) = (b for b in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) if "gymtrl model" in b)
    assert " ".join(SERVERS) in block
    loop = block[block.index("for server") :].replace("models/tools", str(smollm2_tools_dir))
    env = os.environ | {"SITE": str(gym_site_packages), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", loop], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for server in SERVERS:
        kept = read_manifest(tmp_path / "runs" / server / "filter").counts
        made = read_manifest(tmp_path / "runs" / server / "sft").counts
        assert kept and made and kept.read == 5
        assert made.written >= 0.95 * made.read
        assert re.search(rf"\| `{server}`.* \| {kept.read} \| {kept.written} \| {made.written} \|", README)
