"""Real parts that tests share: model folders and a Gym installation, made once and kept between runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # tests share the cores: OpenMP's threads must not spin long
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GYMTRL_HOME", str(Path(__file__).parent.parent / ".gymtrl"))

from gymtrl.gym.install import GymInstallation, setup_gym
from gymtrl.gym.settings import GymSetupSettings
from gymtrl.home import gymtrl_home


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct with its own chat template."""
    return _smollm2("SmolLM2-135M-Instruct", "own")


@pytest.fixture(scope="session")
def smollm2_tools_dir() -> Path:
    """SmolLM2-135M-Instruct with a chat template that knows tools."""
    return _smollm2("SmolLM2-135M-Instruct-tools", "qwen2.5")


@pytest.fixture(scope="session")
def gym_installation() -> GymInstallation:
    """The real NeMo Gym with the packages of reasoning_gym."""
    with _one_process_at_a_time():
        return setup_gym(GymSetupSettings(servers=["reasoning_gym"]), say=lambda line: None)


@pytest.fixture(scope="session")
def gym_python(gym_installation: GymInstallation) -> Path:
    """The interpreter of Gym's environment."""
    return Path(gym_installation.python)


@pytest.fixture(scope="session")
def gym_site_packages(gym_installation: GymInstallation) -> Path:
    """The folder that holds Gym's packages and the rollout files that it ships."""
    return gym_installation.site_packages


def _smollm2(name: str, template: str) -> Path:
    from gymtrl.models.smollm2 import make_smollm2

    folder = gymtrl_home() / "models" / name
    with _one_process_at_a_time():
        return folder if folder.exists() else make_smollm2(folder, template=template)  # type: ignore[arg-type]


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    gymtrl_home().mkdir(parents=True, exist_ok=True)
    with FileLock(gymtrl_home() / "tests.lock"):
        yield
