"""A supervisor starts its node again after a reboot, ends with it otherwise, and never runs twice."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.lab import cgroups, supervisor

COUNTING = """
import pathlib, sys
path = pathlib.Path(sys.argv[1]); count = int(path.read_text()) + 1 if path.exists() else 1
path.write_text(str(count)); sys.exit(133 if count < 3 else int(sys.argv[2]))
"""


def settings(tmp_path: Path, argv: list[str]) -> dict[str, Any]:
    return {
        "argv": argv,
        "environment": {},
        "link": "vb-none-here",
        "upper": str(tmp_path / "upper"),
        "cgroup": None,
    }


@pytest.mark.parametrize("last", [0, 1])
def test_a_reboot_starts_the_node_again_and_an_end_does_not(tmp_path: Path, last: int) -> None:
    count = tmp_path / "count"
    argv = [sys.executable, "-c", COUNTING, str(count), str(last)]
    assert supervisor.keep(tmp_path, settings(tmp_path, argv)) == last
    assert count.read_text() == "3"


def test_a_hanging_nspawn_without_an_init_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    supervisor.stop_container(child, str(tmp_path / "upper"))
    assert child.returncode == -9


def test_a_second_supervisor_of_a_node_refuses(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "supervisor.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert supervisor.main([str(tmp_path / "run.json")]) == 3
    finally:
        os.close(lock)
    assert not (tmp_path / "supervisor.json").exists()


def test_hierarchies_are_found_on_unified_and_hybrid_hosts() -> None:
    hybrid = (
        "30 1 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "31 1 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        "32 1 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw\n"
    )
    assert cgroups.hierarchies(hybrid) == [
        Path("/sys/fs/cgroup/systemd"),
        Path("/sys/fs/cgroup/unified"),
    ]
    unified = "30 1 0:30 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n"
    assert cgroups.hierarchies(unified) == [Path("/sys/fs/cgroup")]


def test_each_node_has_a_group_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", lambda mountinfo: [tmp_path])
    cgroups.enter("ls0-node1")
    entered = tmp_path / "lockstep-lab/ls0-node1/cgroup.procs"
    assert entered.read_text() == f"{os.getpid()}\n"
    entered.unlink()
    (tmp_path / "lockstep-lab/ls0-node1/payload/system.slice").mkdir(parents=True)
    (tmp_path / "lockstep-lab/ls0-node2").mkdir()
    assert cgroups.leave_and_remove("ls0-node1") is True
    assert [path.name for path in (tmp_path / "lockstep-lab").iterdir()] == ["ls0-node2"]
