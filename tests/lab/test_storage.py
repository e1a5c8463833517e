"""Storage by NFS between machines with kernels of their own: mounted, the same files on both, back after any
cut, and in bounded time named where it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.site import Site, bare, beside

pytestmark = pytest.mark.slow

STATE = beside("tests-storage")
TIMEOUT = 20
"""Seconds that a mount may take, as the cluster file declares."""
LEAVE = {"manage": "unmanaged"}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """node1 serves /data, node2 mounts it; both hold the same files with their checksums."""
    with bare(STATE, "--kind", "vm", systems="debian") as site:
        storage = {"kind": "nfs", "path": "/data", "server": "node1", "timeout": TIMEOUT}
        packages = {"local": "/srv/lockstep/packages", "install": []}
        site.declare(storage=storage, packages=packages, pdsh=LEAVE, limits=LEAVE)
        site.converge()
        write = "dd if=/dev/urandom of=whole bs=1M count=8 conv=fsync 2>&1 && sha256sum whole >sum"
        print(site.shell("node2", f"cd /data && {write}"))
        yield site


def findings(site: Site) -> dict[str, list[str]]:
    """Node to the ids that verify names there for exports and storage."""
    found: dict[str, list[str]] = {}
    for each in site.verify()["findings"]:
        if each["role"] in ("exports", "storage"):
            found.setdefault(each["node"], []).append(each["id"])
    return found


def same_files(site: Site) -> None:
    for node in site.nodes:
        assert site.shell(node, "cd /data && sha256sum -c sum") == "whole: OK\n"


def test_a_second_run_changes_nothing_and_both_nodes_see_the_same_files(site: Site) -> None:
    results: dict[str, Any] = site.converge()
    assert results["totals"]["success"] == 0
    same_files(site)


@pytest.mark.parametrize(
    ("node", "script", "expected"),
    [
        ("node1", "systemctl stop nfs-server", {"node1": ["nfs-server-stopped"]}),
        ("node1", "exportfs -ua", {"node1": ["nfs-exports"]}),
        ("node1", "systemctl disable -q nfs-server", {"node1": ["nfs-server-stopped"]}),
        ("node1", "rm -r /etc/exports.d; exportfs -r", {"node1": ["nfs-exports"]}),
        ("node1", "echo 3 >/proc/fs/nfsd/threads", {"node1": ["nfs-threads"]}),
        ("node2", "sed -i /lockstep/d /etc/fstab", {"node2": ["nfs-fstab"]}),
        ("node2", "systemctl stop data.automount", {"node2": ["nfs-mount-wrong"]}),
        (
            "node1",
            "cp -a /data /new; mv /data /old; mv /new /data; exportfs -f; rm -r /old",
            {"node2": ["nfs-stale-handle"]},
        ),
    ],
)  # fmt: skip
def test_what_breaks_is_named_and_one_run_mends_it(
    site: Site, node: str, script: str, expected: dict[str, list[str]]
) -> None:
    site.shell(node, script)
    found = findings(site)
    assert {name: ids for name, ids in found.items() if name in expected} == expected
    site.converge()
    assert findings(site) == {}
    same_files(site)


def test_a_client_that_boots_before_its_server_waits_no_longer_than_declared(site: Site) -> None:
    """Power goes on both in the middle of a write; what was written whole stays."""
    site.shell(
        "node2",
        "cd /data; (setsid dd if=/dev/zero of=half bs=64k count=4000 >/dev/null 2>&1 &); sleep 1",
    )
    for node in ("node1", "node2"):
        assert site.lockstep("lab", "cut", node).returncode == 0
    assert site.lockstep("lab", "start", "node2").returncode == 0
    began = time.monotonic()
    assert site.shell("node2", "ls /data", check=False) == ""
    print(f"ls without the server: {time.monotonic() - began:.1f} s, declared {TIMEOUT} s")
    assert site.lockstep("lab", "start", "node1").returncode == 0
    site.converge()
    assert site.converge()["totals"]["success"] == 0
    same_files(site)
