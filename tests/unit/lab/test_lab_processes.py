"""A pid is believed only with its start time, boot id and command line; a node's init by its root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab import processes
from deploy.lab.processes import Process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "marker"])
    yield child
    child.kill()
    child.wait()


def identified(pid: int) -> Process:
    found = processes.identify(pid)
    assert found is not None
    return found


def test_a_living_process_is_recognised_by_its_own_record(sleeper: subprocess.Popen[bytes]) -> None:
    found = identified(sleeper.pid)
    record = found.as_json()
    assert processes.alive(found)
    assert processes.verified(record, "marker") == found


def test_a_record_does_not_match_another_process_with_the_same_pid(
    sleeper: subprocess.Popen[bytes],
) -> None:
    found = identified(sleeper.pid)
    for stale in (replace(found, start=found.start - 1), replace(found, boot="another")):
        assert not processes.alive(stale)
        assert processes.verified(stale.as_json(), "marker") is None
        assert processes.kill(stale) is False
    assert sleeper.poll() is None


def test_a_process_with_another_command_line_is_not_the_recorded_one(
    sleeper: subprocess.Popen[bytes],
) -> None:
    assert processes.verified(identified(sleeper.pid).as_json(), "mark") is None


def test_the_recorded_process_itself_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    found = identified(sleeper.pid)
    assert processes.kill(found, signal.SIGKILL) is True
    assert sleeper.wait(10) == -signal.SIGKILL
    assert processes.kill(found) is False
    assert processes.wait_gone([found], 0) == []


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.identify(child.pid) is None
    child.wait()


def test_waiting_is_bounded_and_names_who_is_left(sleeper: subprocess.Popen[bytes]) -> None:
    found = identified(sleeper.pid)
    assert processes.wait_gone([found], 0.05) == [found]


@pytest.mark.parametrize(
    "record",
    [
        None,
        7,
        {},
        {"pid": 1, "start": 1, "boot": "b"},
        {"pid": "7", "start": 1, "boot": "b"},
        {"pid": 7},
    ],
)
def test_a_broken_record_names_no_process(record: object) -> None:
    assert processes.from_json(record) is None


def test_stat_is_parsed_whatever_the_process_calls_itself() -> None:
    tail = "S 1 2 3 0 -1 4 5 6 7 8 9 10 11 12 20 0 1 0 4242 13"
    assert processes.parse_stat(f"77 (a) b) c) {tail}") == ("S", 4242)


OVERLAY = (
    "600 500 0:40 / / rw,relatime - overlay lockstep-lab "
    "rw,lowerdir=/b/root,upperdir={upper},workdir=/n/work\n601 600 0:41 / /proc rw - proc proc rw\n"
)


def fake_process(proc: Path, pid: int, nspid: str, mountinfo: str) -> None:
    directory = proc / str(pid)
    directory.mkdir()
    (directory / "status").write_text(f"Name:\tsystemd\nNSpid:\t{nspid}\n")
    (directory / "mountinfo").write_text(mountinfo)
    fields = " ".join(["S"] + ["0"] * 18 + [str(pid * 10), "0"])
    (directory / "stat").write_text(f"{pid} (systemd) {fields}")


def test_only_the_first_process_of_a_container_on_an_overlay_is_a_node_s_init(
    tmp_path: Path,
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("NSpid:\t9\n")
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("b\n")
    fake_process(tmp_path, 100, "100\t1", OVERLAY.format(upper="/labs/nodes/node1/upper"))
    fake_process(tmp_path, 101, "101\t25", OVERLAY.format(upper="/labs/nodes/node1/upper"))
    fake_process(tmp_path, 102, "102\t30\t1", OVERLAY.format(upper="/labs/nodes/node3/upper"))
    fake_process(tmp_path, 103, "103\t1", "20 1 8:1 / / rw - ext4 /dev/vda rw\n")
    fake_process(tmp_path, 104, "104", OVERLAY.format(upper="/labs/nodes/node2/upper"))
    (tmp_path / "105").mkdir()
    assert processes.inits(tmp_path) == {"/labs/nodes/node1/upper": Process(100, 1000, "b")}
