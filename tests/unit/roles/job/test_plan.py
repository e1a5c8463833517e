"""Exactly what a node would run, and the unit that it becomes."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from roles.job.plan import Here, Launch, Plan, compose, free_port
from roles.job.unit import ENDED, STOP, end, unit_file, word

PLAN = Plan(
    attempt=3,
    nodes=("node1", "node2"),
    boot_ids={"node1": "a", "node2": "b"},
    master_address="10.0.0.1",
    master_port=29501,
    world_size=16,
    processes=8,
    started=1000,
)


OPERATORS = {"TORCH_EXTENSIONS_DIR": "/var/lib/lockstep/ops/main"}


def launch(here: Here, plan: Plan = PLAN, **extra: str) -> Launch:
    return compose(
        plan,
        here,
        job="light",
        run="/shared/runs/light",
        prefix="/opt/envs/main",
        operators=OPERATORS,
        extra=extra,
    )


def test_the_launch_of_a_gpu_node_is_exactly_this() -> None:
    found = launch(Here("node2", "ens3f0", cores=64, gpus=8))
    assert found.command == (
        *("/opt/envs/main/bin/torchrun", "--nnodes", "2", "--nproc-per-node", "8"),
        *("--node-rank", "1", "--master-addr", "10.0.0.1", "--master-port", "29501"),
        *("--rdzv-id", "light-3", "-m", "trainer", "/shared/runs/light/trainer.yaml"),
    )
    assert found.environment == {
        "PATH": "/opt/envs/main/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29501",
        "GLOO_SOCKET_IFNAME": "ens3f0",
        "NCCL_SOCKET_IFNAME": "=ens3f0",
        "TORCH_EXTENSIONS_DIR": "/var/lib/lockstep/ops/main",
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "8",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "LOCKSTEP_GPUS": "8",
        "LOCKSTEP_ATTEMPT": "3",
        "LOCKSTEP_ATTEMPT_DIR": "/shared/runs/light/attempts/3",
    }
    assert found.log == "/shared/runs/light/attempts/3/node2.log"
    assert found.unit == "lockstep-light.service"


def test_a_node_without_gpus_is_told_so_and_gets_its_own_interface() -> None:
    found = launch(Here("node1", "host0", cores=2, gpus=0))
    assert found.environment["DS_ACCELERATOR"] == "cpu"
    assert found.environment["GLOO_SOCKET_IFNAME"] == "host0"
    assert found.environment["OMP_NUM_THREADS"] == "1", "never 0, with more processes than cores"
    assert found.command[found.command.index("--node-rank") + 1] == "0"


def test_the_job_files_variables_win() -> None:
    found = launch(Here("node1", "host0", 64, 8), NCCL_DEBUG="INFO", MINE="a b")
    assert found.environment["NCCL_DEBUG"] == "INFO"
    assert found.lines()[-2:] == ["MINE='a b'", shlex.join(found.command)]


def test_ipv6_is_told_to_nccl() -> None:
    found = launch(Here("node1", "host0", 64, 8), replace(PLAN, master_address="fd00::1"))
    assert found.environment["NCCL_SOCKET_FAMILY"] == "AF_INET6"
    assert found.command[found.command.index("--master-addr") + 1] == "fd00::1"


def test_the_rendezvous_id_differs_between_attempts() -> None:
    one = launch(Here("node1", "host0", 64, 8)).command
    two = launch(Here("node1", "host0", 64, 8), replace(PLAN, attempt=4)).command
    assert one[one.index("--rdzv-id") + 1] != two[two.index("--rdzv-id") + 1]


def test_a_plan_survives_its_json() -> None:
    assert Plan.from_json(PLAN.as_json()) == PLAN


@pytest.mark.parametrize(("taken", "port"), [((), 5), ((5, 6), 7), ((5, 6, 7), None)])
def test_the_first_free_port_of_the_range_is_taken(
    taken: tuple[int, ...], port: int | None
) -> None:
    assert free_port(5, 7, taken) == port


def test_the_unit_is_not_started_by_a_reboot_and_never_restarted() -> None:
    text = unit_file(replace(launch(Here("node1", "host0", 64, 8)), limits=("LimitNOFILE=4096",)))
    assert "[Install]" not in text
    assert "Restart=no\n" in text
    assert "KillMode=control-group\n" in text
    assert "LimitNOFILE=4096\n" in text
    assert "Description=Lockstep job light, attempt 3\n" in text
    assert 'Environment="NCCL_SOCKET_IFNAME==host0"\n' in text
    assert '"/opt/envs/main/bin/torchrun" "--nnodes" "2"' in text


def test_words_of_a_unit_file_are_taken_literally() -> None:
    assert word('a "b" \\ 5% $HOME') == '"a \\"b\\" \\\\ 5%% $$HOME"'
    assert word("$HOME 5%", command=False) == '"$HOME 5%%"'


def sh(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
        timeout=20,
        check=False,
    )


def test_the_end_of_a_unit_is_recorded_whole(tmp_path: Path) -> None:
    record = tmp_path / "node1.exit"
    sh(ENDED, str(record), SERVICE_RESULT="oom-kill", EXIT_CODE="killed", EXIT_STATUS="KILL")
    assert record.read_text() == "oom-kill killed KILL\n"
    sh(ENDED, str(record), SERVICE_RESULT="start-limit-hit")
    assert record.read_text() == "start-limit-hit - -\n", "always three words"
    assert [path.name for path in tmp_path.iterdir()] == ["node1.exit"]


def test_stopping_asks_the_ranks_and_waits_for_the_launcher(tmp_path: Path) -> None:
    mark, rank = tmp_path / "asked", tmp_path / "rank"
    rank_script = f"trap 'echo told >{rank}; exit 1' TERM; echo ready; while :; do sleep 0.05; done"
    agent = subprocess.Popen(
        ["sh", "-c", f'sh -c "{rank_script}"; sleep 0.3'], stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None and agent.stdout.readline() == "ready\n"
    stop = subprocess.Popen(
        ["sh", "-c", STOP, str(mark)], env={"PATH": "/usr/bin:/bin", "MAINPID": str(agent.pid)}
    )
    assert agent.wait(10) == 0, "the launcher itself got no signal"
    assert stop.wait(10) == 0
    assert rank.read_text() == "told\n"
    assert mark.exists()


@pytest.mark.parametrize("environment", [{}, {"MAINPID": "1", "SERVICE_RESULT": "oom-kill"}])
def test_an_end_that_nobody_asked_for_is_not_marked(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    assert sh(STOP, str(tmp_path / "asked"), **environment).returncode == 0
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("shown", "active", "killed", "marked"),
    [
        ("Lockstep job light, attempt 3", True, True, True),
        ("Lockstep job light, attempt 3", False, True, False),
        ("Lockstep job light, attempt 4", True, False, False),
    ],
    ids=["a survivor", "one that ended by itself keeps its record", "one of a newer attempt"],
)
def test_only_survivors_of_that_attempt_are_killed(
    tmp_path: Path, shown: str, active: bool, killed: bool, marked: bool
) -> None:
    run, calls = tmp_path / "run", tmp_path / "calls"
    (run / "attempts" / "3").mkdir(parents=True)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "systemctl").write_text(
        f'#!/bin/sh\necho "$1" >>{calls}\n'
        f'case $1 in show) echo "{shown}";; is-active) exit {0 if active else 3};; esac\n'
    )
    (tools / "systemctl").chmod(0o755)
    done = sh("set -e\n" + end("light", str(run), 3, "node1"), PATH=f"{tools}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert ("kill" in calls.read_text().split()) == killed
    assert (run / "attempts" / "3" / "node1.asked").exists() == marked
