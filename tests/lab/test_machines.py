"""What needs kernels of their own, on one pair of emulated machines: storage by NFS and its server, clocks that
differ, limits above a container's, a driver that is really loaded, another kernel; found, and mended by one run.
They are rebooted, shut down and cut off in every order, too: nothing is lost, or hangs longer than declared."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from deploy.lab.standins import DRIVER_VERSIONS
from tests.lab.cycle import Case, cases, cycle, label, plan
from tests.lab.site import JOB, SECTIONS, Site, bare, beside, with_packages

pytestmark = pytest.mark.slow

STATE = beside("tests-machines")
TIMEOUT = 20
"""Seconds that a mount may take, and a server that is gone hold up a shutdown, as the cluster file declares."""
STOP_SECONDS = 90
"""systemd's own patience with what does not end: a shutdown that took longer hung."""
LEAVE = {"manage": "unmanaged"}
UPGRADE = "driver/kernel-upgraded"
"""It shows whole after a reboot only, so it has a test of its own."""
DECLARED = {
    "storage": {
        "kind": "nfs",
        "path": "/data",
        "server": "node1",
        "timeout": TIMEOUT,
    },
    "packages": {"local": "/srv/lockstep/packages", "install": ["zstd"]},
    "time": {},
    "driver": {**SECTIONS["driver"], "nodes": ["node1", "node2"], "persistence": False},
    "limits": {"nofile": 1048576, "memlock": "unlimited", "max_map_count": 262144},
    "pdsh": LEAVE,
    "network": LEAVE,
    "trainer": LEAVE,
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
    environment = ("--environment", "--trim")
    with bare(STATE, "--kind", "vm", *environment, *packages, systems="debian") as site:
        print(f"lab up: {time.monotonic() - began:.1f} s", flush=True)
        without = {**site.declared()["environments"], **LEAVE}
        site.declare(**DECLARED, environments=without, fetch=site.words("/data/models/words"))
        with timed("first run"):
            site.converge()
        write = "dd if=/dev/urandom of=whole bs=1M count=16 conv=fsync && sha256sum whole >sum"
        print(site.shell("node2", f"cd /data && {{ {write}; }} 2>&1"))
        yield site


def same_files(site: Site) -> None:
    for node in site.nodes:
        assert site.shell(node, "cd /data && sha256sum -c sum") == "whole: OK\n"
        assert site.shell(node, "wc -l </data/models/words/two.txt") == "1000\n"


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


def one_run_brings_all_right(site: Site) -> None:
    """After it nothing differs, a second one changes nothing, and the files of both nodes are whole."""
    with timed("one run"):
        site.converge()
    report = site.verify()
    assert report["verdict"] == "ok", report
    with timed("a second one"):
        assert site.converge()["totals"]["success"] == 0
    same_files(site)


def power(site: Site, act: str, *nodes: str) -> None:
    """``lab cut`` or ``start`` of each, one after the other."""
    for node in nodes:
        with timed(f"{act} {node}"):
            done = site.lockstep("lab", act, node)
            assert done.returncode == 0, done.stderr


def reboot(site: Site, *arguments: str) -> None:
    """``lockstep reboot``: what was right before is right again, and nothing is wrong."""
    done = site.lockstep("reboot", "--json", *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    for each in json.loads(done.stdout)["nodes"]:
        print(f"reboot of {each['node']}: {each['seconds']} s", flush=True)


def shut_down(site: Site, node: str) -> float:
    """Have a machine power itself off; seconds from the order until it is off."""
    began = time.monotonic()
    site.shell(
        node, "systemctl --no-block poweroff", check=False
    )  # it may be off before it answers
    runs = site.state / "nodes" / node / "qemu.json"
    site.wait(f"{node} is off", lambda: not runs.exists(), 400)
    return time.monotonic() - began


def write_without_end(site: Site) -> None:
    """Have node2 write on, whatever becomes of its server."""
    writer = "setsid dd if=/dev/zero of=half bs=64k count=8000 >/dev/null 2>&1"
    site.shell("node2", f"cd /data; ({writer} &); sleep 3")


def summed(name: str) -> str:
    """Shell that takes a stream to a file of the storage, and leaves its checksum on the node's own disk."""
    return f"tee /data/{name} | sha256sum | sed s/-/{name}/ >/root/{name}.new; mv /root/{name}.new /root/{name}"


def whole(site: Site, name: str) -> bool:
    """Whether the server has what node2 wrote with ``summed``."""
    sums = site.shell("node2", f"cat /root/{name}")
    return site.shell("node1", f"cd /data; echo '{sums.strip()}' | sha256sum -c") == f"{name}: OK\n"


LAST = f"""
cd /data; exec 5>open
trap "head -c 16777216 /dev/urandom | {summed("last")}; exit" TERM
while :; do sleep 1; done
"""
"""A service that writes its last data when the shutdown ends it, as a job does."""


def test_a_shutdown_loses_nothing_and_ends_in_the_declared_time_where_the_server_is_gone(
    site: Site,
) -> None:
    """First with the server, then without its power: while nothing uses the mount, and while a process writes."""
    site.shell(
        "node2", f"cat >/root/last.sh <<'end'\n{LAST}end\nsystemd-run -q sh /root/last.sh; sleep 5"
    )
    took = {"with the server": shut_down(site, "node2")}
    power(site, "start", "node2")
    one_run_brings_all_right(site)
    assert whole(site, "last")
    power(site, "cut", "node1")
    took["without it"] = shut_down(site, "node2")
    power(site, "start", "node1", "node2")
    one_run_brings_all_right(site)
    write_without_end(site)
    power(site, "cut", "node1")
    took["without it, while writing"] = shut_down(site, "node2")
    print({name: f"{seconds:.1f} s" for name, seconds in took.items()}, flush=True)
    power(site, "start", "node2")
    began = time.monotonic()
    assert site.shell("node2", "ls /data", check=False) == ""
    listed = time.monotonic() - began
    print(f"ls without the server: {listed:.1f} s, declared {TIMEOUT} s", flush=True)
    site.declare(time=LEAVE)  # the server keeps the time as well
    with timed("a run without the server"):
        refused = site.pyinfra("deploy/cluster.py", "-y", "--limit", "node2")
    assert refused.returncode == 1 and "nfs-server-silent" in refused.stderr, refused.stderr[-4000:]
    site.declare(time={})
    power(site, "start", "node1")
    one_run_brings_all_right(site)
    assert whole(site, "last")
    assert took["with the server"] < STOP_SECONDS
    assert max(took.values()) < took["with the server"] + TIMEOUT
    assert listed < TIMEOUT + took["with the server"]


UNPLUGGED = r"""
dev=$(ip -o route get {address} | sed 's/.* dev \([^ ]*\) .*/\1/')
ip link set "$dev" down; sleep 20; ip link set "$dev" up
"""


def test_a_write_goes_on_after_its_network_and_its_server_were_gone_and_all_may_reboot_at_once(
    site: Site,
) -> None:
    slowly = "for each in $(seq 90); do head -c 262144 /dev/urandom; sleep 1; done"
    writer = f"{{ {slowly}; }} | {summed('through')}"
    site.shell(
        "node2", f"cat >/root/through.sh <<'end'\n{writer}\nend\nsystemd-run -q sh /root/through.sh"
    )
    unplugged = UNPLUGGED.format(address=site.declared()["nodes"]["node1"]["address"])
    with timed("network of node2 cut"):
        site.shell("node2", unplugged)
    assert site.shell("node2", "ls /root/through", check=False) == ""
    reboot(site, "node1")
    site.wait("it is written", lambda: site.shell("node2", "ls /root/through", check=False), 300)
    one_run_brings_all_right(site)
    assert whole(site, "through")
    reboot(site, "--all", "--at-once")
    one_run_brings_all_right(site)
    assert whole(site, "through")


def test_a_power_cut_of_both_during_a_write_is_over_after_one_run(site: Site) -> None:
    write_without_end(site)
    power(site, "cut", "node1", "node2")
    power(site, "start", "node1", "node2")
    one_run_brings_all_right(site)
    assert whole(site, "through")


RUN, STEPS, EVERY = "machines", 50, 10
"""A job, its steps, and after how many it writes a checkpoint."""


def checkpoint(site: Site, last: int) -> int:
    """Wait until the job has a complete checkpoint of a later step than this; its step."""
    look = f"cd /data/runs/{RUN}/checkpoints 2>/dev/null && ls step-*/COMPLETE"
    found = [last]

    def there() -> bool:
        names = site.shell("node1", look, check=False).split()
        found[:] = [last, *(int(name.removeprefix("step-").partition("/")[0]) for name in names)]
        return max(found) > last

    with timed(f"a checkpoint after step {last}"):
        site.wait("a complete checkpoint", there, 900, every=5)
    return max(found)


def test_a_job_on_the_mount_goes_on_after_a_power_cut_of_either_node(site: Site) -> None:
    """After the worker's by one run; after that of the server, which is the head, by itself."""
    brief = {"imports": ["numpy"], "commands": []}  # torch is imported by the job
    main = {**site.declared()["environments"]["main"], **brief}
    data = {**JOB["trainer"]["data"], "files": ["/data/text/*"]}
    trainer = {"data": data, "steps": STEPS, "checkpoint": {"every": EVERY}}
    declared = {"name": RUN, "first_step_seconds": 900, "trainer": trainer}
    job = site.write_job(**declared)
    site.shell("node1", "mkdir /data/text; cp -L /usr/share/common-licenses/GPL* /data/text")
    site.declare(environments={"main": main}, trainer=None, job=str(job))
    with timed("environment brought, job started"):
        site.converge()
    last = checkpoint(site, 0)
    site.shell("node2", f"systemctl kill -s STOP lockstep-{RUN}.service")  # still in the middle
    power(site, "cut", "node2")
    power(site, "start", "node2")
    with timed("resumed by one run"):
        site.converge()
    checkpoint(site, last)
    site.shell("node2", f"systemctl kill -s STOP lockstep-{RUN}.service")
    site.write_job(**declared, autostart=True)
    site.converge()
    power(site, "cut", "node1")
    power(site, "start", "node1")
    ended = f"ls /data/runs/{RUN}/complete.json 2>/dev/null"
    with timed("resumed by itself, and complete"):
        site.wait("it is complete", lambda: site.shell("node1", ended, check=False), 900, every=5)
    text = site.shell("node1", f"cat /data/runs/{RUN}/metrics.jsonl")
    records = [json.loads(line) for line in text.splitlines()]
    written = [record["step"] for record in records]
    assert written == sorted(set(written)) and written[-1] == STEPS
    first = {record["attempt"]: record["step"] for record in reversed(records)}
    print(first, flush=True)
    assert sorted(first) == [1, 2, 3] and first[3] > first[2] > EVERY
    site.write_job(**declared)
    one_run_brings_all_right(site)
    site.declare(environments={"main": main, **LEAVE}, trainer=LEAVE, job=None)


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
