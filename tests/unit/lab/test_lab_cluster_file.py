"""The lab's cluster file says how to reach each node, and never replaces a file that is not the lab's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy.lab import cluster_file
from deploy.lab.cluster_file import Entry
from deploy.lab.errors import LabError
from deploy.lab.state import Paths, Record

PATHS = Paths(Path("/var/lib/lockstep-lab"), Path("/var/lib/lockstep-lab/cache"))
SSH = "/var/lib/lockstep-lab/ssh"
NODES = [
    Entry("node1", "10.77.0.11"),
    Entry("node2", "10.77.0.12", "ops", Path(f"{SSH}/node2.password")),
]


def test_the_file_has_the_documented_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_file, "own_limits", lambda: (False, 8192))
    assert yaml.safe_load(cluster_file.cluster_text(PATHS, Record(0), NODES)) == {
        "cluster": "lab",
        "ssh": {
            "user": "root",
            "port": 22,
            "key": f"{SSH}/id_ed25519",
            "known_hosts": f"{SSH}/known_hosts",
        },
        "nodes": {
            "node1": {"address": "10.77.0.11"},
            "node2": {
                "address": "10.77.0.12",
                "ssh": {"user": "ops", "sudo": {"password_file": f"{SSH}/node2.password"}},
            },
        },
        "packages": {"local": "/srv/lockstep/packages"},
        "storage": {"kind": "existing", "path": "/shared"},
        "limits": {"nofile": 4096, "memlock": 4096, "shm": "256M"},
    }


def test_archive_and_job_are_named_when_given() -> None:
    text = cluster_file.cluster_text(
        PATHS, Record(0), NODES, Path("/c/environment-1.tar.zst"), Path("/jobs/it's: #1.yaml")
    )
    value = yaml.safe_load(text)
    assert value["environments"] == {"main": {"archive": "/c/environment-1.tar.zst"}}
    assert value["job"] == "/jobs/it's: #1.yaml"


def test_two_labs_are_two_clusters() -> None:
    assert yaml.safe_load(cluster_file.cluster_text(PATHS, Record(7), NODES))["cluster"] == "lab7"


@pytest.mark.parametrize(
    ("environ", "write", "expected"),
    [
        ({}, None, cluster_file.DEFAULT_FILE),
        ({"LOCKSTEP_CLUSTER": "/c.yaml"}, None, cluster_file.DEFAULT_FILE),
        ({"LOCKSTEP_CLUSTER": "/c.yaml", "LOCKSTEP_LAB": "/srv/l"}, None, Path("/c.yaml")),
        ({"LOCKSTEP_CLUSTER": "/c.yaml", "LOCKSTEP_LAB": "/srv/l"}, "/w.yaml", Path("/w.yaml")),
    ],
)
def test_where_the_file_goes(environ: dict[str, str], write: str | None, expected: Path) -> None:
    assert cluster_file.target(environ, write) == expected


def test_the_file_is_rewritten_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    assert cluster_file.write_cluster_file(path, PATHS, Record(0), NODES) is True
    assert cluster_file.write_cluster_file(path, PATHS, Record(0), NODES) is False
    assert cluster_file.write_cluster_file(path, PATHS, Record(0), NODES[:1]) is True
    assert list(yaml.safe_load(path.read_text())["nodes"]) == ["node1"]


@pytest.mark.parametrize(
    "text", ["cluster: mine\n", "", cluster_file.HEADER.format(state="/srv/other")]
)
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(LabError, match="stays as it is: give --write another file"):
        cluster_file.write_cluster_file(path, PATHS, Record(0), NODES)
    assert path.read_text() == text
    assert not cluster_file.belongs(path, PATHS)


@pytest.mark.parametrize("name", [".", "absent/lab.yaml"])
def test_a_place_that_cannot_hold_the_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError, match="cannot be written as a cluster file"):
        cluster_file.check_target(tmp_path / name, PATHS)


@pytest.mark.parametrize(
    ("may_raise", "hard_kib", "expected"),
    [(True, 64, 65536), (False, 8192, 4096), (False, 64, 64), (False, 1 << 30, 4096)],
)
def test_the_memlock_limit_can_be_granted_and_is_not_the_default(
    may_raise: bool, hard_kib: int, expected: int
) -> None:
    assert cluster_file.memlock_kib(may_raise, hard_kib) == expected


def test_this_process_s_own_limits_are_read() -> None:
    may_raise, hard_kib = cluster_file.own_limits()
    assert may_raise in (True, False)
    assert hard_kib > 0
