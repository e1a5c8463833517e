"""What needs kernels of their own, on one pair of emulated machines: storage by NFS and its server, clocks that
differ, limits above a container's, a driver that is really loaded, another kernel; found, and mended by one run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from deploy.lab.standins import DRIVER_VERSIONS
from tests.lab.cycle import Case, cases, cycle, label, plan
from tests.lab.site import SECTIONS, Site, bare, beside, with_packages

pytestmark = pytest.mark.slow

STATE = beside("tests-machines")
TIMEOUT = 20
"""Seconds that a mount may take, as the cluster file declares."""
LEAVE = {"manage": "unmanaged"}
UPGRADE = "driver/kernel-upgraded"
"""It shows whole after a reboot only, so it has a test of its own."""
DECLARED = {
    "storage": {"kind": "nfs", "path": "/data", "server": "node1", "timeout": TIMEOUT},
    "packages": {"local": "/srv/lockstep/packages", "install": []},
    "time": {},
    "driver": {**SECTIONS["driver"], "nodes": ["node1", "node2"], "persistence": False},
    "limits": {"nofile": 1048576, "memlock": "unlimited", "max_map_count": 262144},
    "pdsh": LEAVE,
    "network": LEAVE,
}
CASES = cases({"node1": "debian", "node2": "debian"}, "vm")


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what a step took, for the test's output."""
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """node1 serves /data, node2 mounts it; both hold the same file with its checksum."""
    began = time.monotonic()
    packages = with_packages("linux-image-rt-amd64", "linux-headers-rt-amd64")
    with bare(STATE, "--kind", "vm", *packages, systems="debian") as site:
        print(f"lab up: {time.monotonic() - began:.1f} s", flush=True)
        site.declare(**DECLARED)
        with timed("first run"):
            site.converge()
        write = "dd if=/dev/urandom of=whole bs=1M count=16 conv=fsync && sha256sum whole >sum"
        print(site.shell("node2", f"cd /data && {{ {write}; }} 2>&1"))
        yield site


def same_files(site: Site) -> None:
    for node in site.nodes:
        assert site.shell(node, "cd /data && sha256sum -c sum") == "whole: OK\n"


def test_a_second_run_changes_nothing_and_both_nodes_see_the_same_files(site: Site) -> None:
    with timed("run without changes"):
        assert site.converge()["totals"]["success"] == 0
    same_files(site)


@pytest.mark.parametrize(
    "broken", plan([case for case in CASES if case.name != UPGRADE]), ids=label
)
def test_what_breaks_is_named_and_mended_by_one_run(site: Site, broken: Sequence[Case]) -> None:
    with timed(label(broken)):
        for row in cycle(site, broken):
            print(row)
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


def test_a_kernel_without_headers_boots_without_the_driver_until_one_run_builds_and_loads_it(
    site: Site,
) -> None:
    case = next(case for case in CASES if case.name == UPGRADE)
    nodes = site.declared()["nodes"]
    nodes[case.node] |= {"gpus": 1, "gpu_class": "upgraded"}  # which may have another kernel
    site.declare(nodes=nodes)
    with timed("another kernel installed"):
        done = site.lockstep("lab", "break", case.node, case.name)
        assert done.returncode == 0, done.stderr
    with timed("reboot"):
        done = site.lockstep("lab", "reboot", case.node)
        assert done.returncode == 0, done.stderr
    assert site.shell(case.node, "uname -r").endswith("-rt-amd64\n")
    assert site.shell(case.node, "ls -d /sys/module/nvidia 2>/dev/null", check=False) == ""
    found = {(each["node"], each["role"], each["id"]) for each in site.verify()["findings"]}
    expected = {(case.node, "driver", name) for name in (case.fault.id, "driver-not-loaded")}
    assert found == expected
    with timed("headers, module built and loaded"):
        site.converge()
    loaded = site.shell(case.node, "cat /sys/module/nvidia/version")
    assert loaded == f"{DRIVER_VERSIONS[0]}\n"
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0
