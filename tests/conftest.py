"""Real parts that tests share: a model folder and a Gym installation, made once and kept between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HOME = Path(os.environ.setdefault("GYMTRL_HOME", str(Path(__file__).parent.parent / ".gymtrl")))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct with its own chat template."""
    from gymtrl.models.smollm2 import make_smollm2

    folder = HOME / "models" / "SmolLM2-135M-Instruct"
    return folder if folder.exists() else make_smollm2(folder)


@pytest.fixture(scope="session")
def smollm2_tools_dir() -> Path:
    """SmolLM2-135M-Instruct with a chat template that knows tools."""
    from gymtrl.models.smollm2 import make_smollm2

    folder = HOME / "models" / "SmolLM2-135M-Instruct-tools"
    return folder if folder.exists() else make_smollm2(folder, template="qwen2.5")


@pytest.fixture(scope="session")
def gym_installation() -> Iterator[object]:
    """The real NeMo Gym with the packages of reasoning_gym."""
    from gymtrl.gym.install import setup_gym
    from gymtrl.gym.settings import GymSetupSettings

    yield setup_gym(GymSetupSettings(servers=["reasoning_gym"]), say=lambda line: None)


@pytest.fixture(scope="session")
def gym_python(gym_installation: object) -> Path:
    """The interpreter of Gym's environment."""
    return Path(gym_installation.python)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def gym_site_packages(gym_installation: object) -> Path:
    """The folder that holds Gym's packages and the rollout files that it ships."""
    return gym_installation.site_packages  # type: ignore[attr-defined, no-any-return]
