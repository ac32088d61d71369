"""Gym: finding a Python, tasks and requests, collecting from the real thing."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml

from gymtrl.demo.tasks import make_tasks
from gymtrl.errors import RunError, UserError
from gymtrl.gym.collect import finished, materialize, read_tasks
from gymtrl.gym.install import GymInstallation, require_installation, setup_gym, uv_executable
from gymtrl.gym.python import find_python, oldest_python
from gymtrl.gym.servers import find_running, free_port, running_gym
from gymtrl.gym.settings import CollectSettings, GymSetupSettings
from gymtrl.gym.status import gym_status, render_status
from gymtrl.rollouts.keys import input_key
from gymtrl.rollouts.reader import read_lines
from gymtrl.validation.session import gym_session
from tiny import tiny_llama

TASK = {"responses_create_params": {"input": "1 + 1 ="}, "answer": "2", "agent_ref": {"name": "a"}}


def test_requests_differ_only_in_their_seed() -> None:
    rows = materialize([TASK, TASK | {"answer": "3"}], CollectSettings(repeats=2, temperature=0.5))
    assert [(r["_ng_task_index"], r["_ng_rollout_index"]) for r in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    seeds = {json.loads(r["responses_create_params"]["metadata"]["extra_body"])["seed"] for r in rows}
    assert len(seeds) == 4
    assert {r["responses_create_params"]["temperature"] for r in rows} == {0.5}
    assert input_key(rows[0]) == input_key(rows[1]) == input_key(TASK) != input_key(rows[2])
    assert "metadata" not in TASK["responses_create_params"]  # the caller's rows stay as they are


def test_a_task_without_agent_needs_one() -> None:
    task = {"responses_create_params": {"input": "x"}}
    with pytest.raises(UserError, match="names no agent"):
        materialize([task], CollectSettings())
    assert materialize([task], CollectSettings(agent="mine"))[0]["agent_ref"] == {"name": "mine"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no tasks"),
        ("{}\n", ":1: not a Gym task"),
        ('{"a"\n', ":1: not JSON"),
        ('{"responses_create_params": {}, "agent_ref": "a"}', "agent_ref is no object"),
        ('{"responses_create_params": {"metadata": {"extra_body": "{"}}}', "extra_body is no JSON"),
    ],
)
def test_bad_task_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_tasks(path)


def test_python_that_gym_does_not_run_on() -> None:
    uv = uv_executable()
    if sys.version_info < (3, 12):
        with pytest.raises(UserError, match=r"does not run on Python 3\.11"):
            find_python(sys.executable, uv)
    assert find_python(None, uv).version >= oldest_python(None)
    with pytest.raises(UserError, match="not a Python interpreter"):
        find_python("/bin/true", uv)


def test_python_that_newer_gyms_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [oldest_python(v) for v in (None, "0.4.0", "0.5", "0.7.0rc1", "1.0")] == [(3, 12, 0)] * 2 + [(3, 13, 14)] * 3
    with pytest.raises(UserError, match="'latest' is no version"):
        oldest_python("latest")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    nothing = tmp_path / "uv"  # no uv: what it knows is not asked
    for version in ("3.12.9", "3.13.2"):
        python = tmp_path / "pyenv" / "versions" / version / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho {version.replace('.', ' ')}\n")
        python.chmod(0o755)
    assert find_python(None, nothing).version == (3, 12, 9)
    assert find_python("3.13", nothing).version == (3, 13, 2)
    with pytest.raises(RunError, match=r"nemo-gym 0\.7\.0 runs on \(3\.13\.14 or newer\).*found: 3\.12\.9, 3\.13\.2"):
        find_python(None, nothing, "0.7.0")
    with pytest.raises(RunError, match=r"no Python 3\.14") as caught:
        find_python("3.14", nothing)
    assert "uv python install 3.14" in str(caught.value.remedy)


def test_installing_twice_does_nothing(gym_installation: GymInstallation) -> None:
    said: list[str] = []
    assert setup_gym(GymSetupSettings(servers=["reasoning_gym"]), say=said.append) == gym_installation
    assert said == [f"nemo-gym {gym_installation.version} is installed in {gym_installation.home}"]


def test_unknown_server_is_named(gym_installation: GymInstallation) -> None:
    with pytest.raises(UserError, match="no resources server 'reasoning_jim'") as caught:
        setup_gym(GymSetupSettings(servers=["reasoning_jim"]), say=lambda line: None)
    assert "reasoning_gym" in str(caught.value.remedy)


def test_status(gym_installation: GymInstallation, tmp_path: Path) -> None:
    shown = render_status(gym_status(None, "http://127.0.0.1:9"))
    assert f"nemo-gym {gym_installation.version}" in shown
    assert "nothing answers at http://127.0.0.1:9" in shown
    assert "run 'gymtrl gym setup'" in render_status(gym_status(tmp_path, "http://127.0.0.1:9"))


def test_demo_tasks_and_their_twins(gym_python: Path) -> None:
    tasks = make_tasks(gym_python)
    assert len(tasks) == 300
    by_question = {t["question"]: t["metadata"]["twin"] for t in tasks}
    asked = "Solve the following multiplication: {}. Give only the result as your final answer."
    assert by_question[asked.format("3 * 4")] == by_question[asked.format("4 * 3")]
    assert by_question[asked.format("3 * 4")] != by_question[asked.format("3 * 5")]
    assert not any("12" in q for q in by_question)  # the worked turn's question is no task


@pytest.mark.slow
def test_collect_from_the_real_gym(gym_installation: GymInstallation, smollm2_dir: Path, tmp_path: Path) -> None:
    tasks = make_tasks(Path(gym_installation.python))[:4]
    settings = CollectSettings(repeats=2, max_output_tokens=8, timeout=60)
    out = tmp_path / "rollouts.jsonl"
    with gym_session("reasoning_gym", tmp_path / "logs") as session:
        first = session.collect(smollm2_dir, tasks, out, settings, name="rollouts")
        assert (first.wanted, first.collected, first.failed) == (8, 8, 0)
        whole = out.read_bytes()

        # What an interrupted run leaves: fewer lines, the last one cut. The same rollouts come back, seed by seed.
        lines = whole.splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:5]) + lines[5][:40])
        assert finished(tasks, out, settings) is None
        second = session.collect(smollm2_dir, tasks, out, settings, name="rollouts")
        assert second == first
        assert texts(whole) == texts(out.read_bytes())

        # An agent that does not exist, and other settings for the same file.
        nobody = settings.model_copy(update={"agent": "nobody"})
        with pytest.raises(UserError, match="no agent"):
            session.collect(smollm2_dir, tasks, tmp_path / "n.jsonl", nobody, name="x")
        with pytest.raises(UserError, match="another collection"):
            session.collect(smollm2_dir, tasks[:2], out, settings, name="x")
    read = list(read_lines([out]))
    assert {line.verdict for line in read} == {"ok"}
    rollouts = [line.rollout for line in read if line.rollout]
    assert all(r.recorded and r.input_key and r.sampling.temperature == 1.0 for r in rollouts)
    assert {r.input_key for r in rollouts} == {input_key(t) for t in tasks}


@pytest.mark.long
def test_a_server_killed_in_the_middle_loses_nothing(
    gym_installation: GymInstallation, smollm2_dir: Path, tmp_path: Path
) -> None:
    tasks = make_tasks(Path(gym_installation.python))[:60]
    settings = CollectSettings(repeats=2, max_output_tokens=48, concurrency=4, timeout=120)
    model = tiny_llama(tmp_path / "model", smollm2_dir)
    out, logs = tmp_path / "rollouts.jsonl", tmp_path / "logs"
    killed: list[float] = []
    found: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "rollouts" and 5 <= done < total and not killed:
            server_process(logs, "reasoning_gym").kill()
            killed.append(time.monotonic())
        if stage.startswith("starting Gym again (reasoning_gym of Gym ended)") and not found:
            found.append(time.monotonic())

    with gym_session("reasoning_gym", logs, progress=progress) as session:
        collection = session.collect(model, tasks, out, settings, name="rollouts")
    assert (collection.wanted, collection.collected, collection.failed) == (120, 120, 0)
    assert found[0] - killed[0] < 30  # Gym itself looks once a minute
    rows = [msgspec.json.decode(line) for line in out.read_bytes().splitlines()]
    keys = sorted((r["_ng_task_index"], r["_ng_rollout_index"]) for r in rows)
    assert keys == [(task, repeat) for task in range(60) for repeat in range(2)]
    assert all(r["response"]["output"][-1]["generation_token_ids"] and "_ng_failure_class" not in r for r in rows)
    assert {line.verdict for line in read_lines([out])} == {"ok"}


def server_process(folder: Path, name: str) -> psutil.Process:
    """The process of one of Gym's servers; Gym lists the shell that started it."""
    port = yaml.safe_load((folder / "env.yaml").read_text())["head_server"]["port"]
    gym = find_running(f"http://127.0.0.1:{port}")
    assert gym is not None
    (shell,) = (server.pid for server in gym.servers if server.process_name == name)
    return next(p for p in psutil.Process(shell).children(recursive=True) if "app.py" in p.cmdline())


def texts(content: bytes) -> dict[tuple[int, int], list[int]]:
    rows = [msgspec.json.decode(line) for line in content.splitlines()]
    return {
        (r["_ng_task_index"], r["_ng_rollout_index"]): r["response"]["output"][-1]["generation_token_ids"] for r in rows
    }


def test_servers_that_this_gym_does_not_have(gym_installation: GymInstallation, tmp_path: Path) -> None:
    for server, known in (("reasoning_jim", "folders"), ("reasoning_gym/other", "reasoning_gym/rewoo_agent")):
        opened = running_gym(
            gym_installation, servers=[server], policy_url="http://127.0.0.1:9/v1", policy_name="p", folder=tmp_path
        )
        with pytest.raises(UserError, match=server) as caught, opened:
            pass
        assert known in str(caught.value.remedy)
    with pytest.raises(UserError, match="packages of Gym's mcqa, tavily are not installed"):
        require_installation(None, ["mcqa/mcqa", "reasoning_gym", "tavily"])


@pytest.mark.long
def test_tasks_of_two_environments_choose_their_agents(
    gym_installation: GymInstallation, smollm2_tools_dir: Path, tmp_path: Path
) -> None:
    # workplace_assistant needs no packages beyond Gym's own: its link is all that is missing.
    home = tmp_path / "home"
    shutil.copytree(gym_installation.venv_links, home / "servers", symlinks=True)
    link = home / "servers" / "resources_servers" / "workplace_assistant" / ".venv"
    link.parent.mkdir()
    link.symlink_to(Path(gym_installation.python).parent.parent, target_is_directory=True)
    servers = ("reasoning_gym", "workplace_assistant")
    installation = msgspec.structs.replace(gym_installation, home=str(home), servers=servers)
    (home / "gym.json").write_bytes(msgspec.json.encode(installation))

    shipped = gym_installation.site_packages / "resources_servers" / "workplace_assistant" / "data" / "example.jsonl"
    office = [task | {"agent_ref": {"name": "workplace_assistant_simple_agent"}} for task in read_tasks(shipped)[:2]]
    tasks = [*make_tasks(Path(gym_installation.python))[:2], *office]
    model = tiny_llama(tmp_path / "model", smollm2_tools_dir, max_position_embeddings=16384)
    out = tmp_path / "rollouts.jsonl"
    with gym_session(servers, tmp_path / "logs", gym_home=home) as session:
        collection = session.collect(
            model, tasks, out, CollectSettings(repeats=1, max_output_tokens=8), name="rollouts"
        )
    assert (collection.collected, collection.failed) == (4, 0)
    agents = {r["_ng_task_index"]: r["agent_ref"]["name"] for r in map(json.loads, out.read_text().splitlines())}
    assert agents == {index: task["agent_ref"]["name"] for index, task in enumerate(tasks)}
    assert len(set(agents.values())) == 2


@pytest.mark.slow
def test_gym_that_cannot_start_says_which_server_and_why(gym_installation: GymInstallation, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(gym_installation.venv_links, home / "servers", symlinks=True)
    broken = home / "servers" / "resources_servers" / "reasoning_gym" / ".venv"
    broken.unlink()
    (broken / "bin").mkdir(parents=True)
    (broken / "bin" / "python").touch()
    (broken / "bin" / "activate").write_text("echo its environment is broken; exit 3\n")
    opened = running_gym(
        msgspec.structs.replace(gym_installation, home=str(home)),
        servers=["reasoning_gym"],
        policy_url="http://127.0.0.1:9/v1",
        policy_name="p",
        folder=tmp_path / "gym",
    )
    with opened as ready, pytest.raises(RunError, match=r"^reasoning_gym of Gym ended.*\n.*environment is broken"):
        ready()


def test_a_running_gym_needs_the_endpoints_port(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="address of its own"), gym_session("s", tmp_path, head="http://127.0.0.1:9"):
        pass


def test_a_collection_without_a_rollout_is_no_success(tmp_path: Path) -> None:
    settings = CollectSettings(repeats=1)
    out = tmp_path / "rollouts.jsonl"
    out.touch()
    (row,) = materialize([TASK], settings)
    (tmp_path / "rollouts_materialized_inputs.jsonl").write_bytes(msgspec.json.encode(row) + b"\n")
    failure = {"_ng_task_index": 0, "_ng_rollout_index": 0, "_ng_failure_class": "http_500"}
    (tmp_path / "rollouts_failures.jsonl").write_text(f"{json.dumps(failure)}\n" * 3)
    # What failed before is to be tried again, not to be taken as done.
    assert finished([TASK], out, settings) is None


def test_ports_are_free_and_out_of_the_way() -> None:
    port = free_port()
    assert 20000 < port < 32768
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
