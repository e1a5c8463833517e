"""``lockstep verify`` as a user runs it, where no node can be looked at: sentences, never a traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from deploy.verify import table
from roles.verify import Identity, Report, Waiting, Wrong

CLUSTER = """\
cluster: alone
nodes: {{node1: {{address: 127.0.0.1, ssh: {{port: {port}}}}}}}
storage: {{kind: existing, path: /data}}
environments: {{main: {{archive: main.tar}}}}
"""

Verify = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def verify(tmp_path: Path) -> Verify:
    """Runs the command for a cluster of one node behind that port of this machine."""

    def run(port: int, more: str = "") -> subprocess.CompletedProcess[str]:
        (tmp_path / "cluster.yaml").write_text(CLUSTER.format(port=port) + more)
        return subprocess.run(
            [sys.executable, "-m", "deploy.cli", "verify", "--json"],
            env=os.environ
            | {
                "LOCKSTEP_CLUSTER": str(tmp_path / "cluster.yaml"),
                "LOCKSTEP_STATE": str(tmp_path / "state"),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_wrong_job_file_is_told_alone(verify: Verify, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("nmae: x\ntrainer: {}\n")
    done = verify(1, "job: job.yaml\n")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"lockstep: {tmp_path}/job.yaml:1: nmae: unknown key")
    assert "Traceback" not in done.stderr


def test_a_node_that_accepts_and_says_nothing_is_unreadable(verify: Verify) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):  # the server is closed at the end
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        done = verify(server.getsockname()[1])
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report["verdict"] == "unreadable"
    assert [(found["node"], found["id"]) for found in report["findings"]] == [
        ("node1", "unreadable")
    ]
    assert "Traceback" not in done.stderr


def test_the_table_has_a_column_a_node_and_says_what_waits() -> None:
    long = "install it, " * 10 + "then go on"
    report = Report(
        nodes=("node1", "node2", "node3"),
        findings=[Wrong("node1", "packages", "package-missing", "rsync", "none", long)],
        waiting=[Waiting("node1", "compiler", ["packages"])],
        identity=[
            Identity("kernel", {"node1": "6.1", "node2": "6.1"}, "equal per class and os", True),
            Identity("MTU", {"node1": "1500", "node2": "9000"}, "equal", False),
            Identity("interface", {"node1": "bond0", "node2": "eno1"}, "any", True),
        ],
    )
    found, waits, facts, verdict = table(report).split("\n\n")
    assert found.splitlines()[1].endswith(long)
    assert [line.split() for line in waits.splitlines()] == [
        ["NODE", "NOT", "JUDGED", "UNTIL", "RIGHT"],
        ["node1", "compiler", "packages"],
    ]
    assert [line.split() for line in facts.splitlines()] == [
        ["FACT", "node1", "node2", "node3", "RULE"],
        ["kernel", "6.1", "6.1", "-", "equal", "per", "class", "and", "os", "ok"],
        ["MTU", "1500", "9000", "-", "equal", "NOT", "OK"],
        ["interface", "bond0", "eno1", "-", "any"],
    ]
    assert verdict == "drift: 2 to mend; run pyinfra inventory.py deploy/cluster.py"
