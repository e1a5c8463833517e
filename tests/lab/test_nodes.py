"""Three nodes of two families, without a job: other interfaces, three firewalls, a node that leaves and returns, another port.

In this order; the nodes are these tests' own, and each test goes on from what the one before it left.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.lab.site import BIN, Site, bare, beside, with_packages

pytestmark = pytest.mark.slow
STATE = beside("tests-nodes")
NAMES = ("node1", "node2", "node3")
PACKAGES = ("firewalld", "ufw", "nftables")
SECTIONS: dict[str, Any] = {
    "packages": {
        "local": "/srv/lockstep/packages",
        "install": ["pdsh", "rsync", "zstd", "nftables"],
    },
    "time": {"manage": "unmanaged"},
    "network": {"leaks": "remove", "firewall": "open"},
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Three bare nodes, with the pinned host keys in a file of the user's."""
    with bare(STATE, *with_packages(*PACKAGES), count=3) as lab:
        declared = yaml.safe_load(lab.cluster.read_text())
        pinned = lab.directory / "known_hosts"
        shutil.copy(declared["ssh"]["known_hosts"], pinned)
        lab.declare(**SECTIONS, ssh={**declared["ssh"], "known_hosts": str(pinned)})
        yield lab


def nodes(lab: Site) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(lab.cluster.read_text())["nodes"]
    return found


def found(lab: Site) -> set[tuple[str, str]]:
    return {(finding["node"], finding["id"]) for finding in lab.verify()["findings"]}


def reaches(lab: Site, name: str) -> dict[str, bool]:
    """Who can open a TCP connection to a port of the node that no rule names: the others, this machine."""
    port, address = 45678, nodes(lab)[name]["address"]
    server = (
        "import socket, time; s = socket.create_server(('', {})); print(flush=True); time.sleep(30)"
    )
    listener = subprocess.Popen(
        [str(BIN / "lockstep"), "lab", "shell", name, "--"]
        + ["timeout", "30", "python3", "-c", server.format(port)],
        env=lab.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert listener.stdout is not None and listener.stdout.readline() == b"\n"
        call = ["timeout", "3", "bash", "-c", f"exec 3<>/dev/tcp/{address}/{port}"]
        answers = {
            other: lab.lockstep("lab", "shell", other, "--", *call).returncode == 0
            for other in nodes(lab)
            if other != name
        }
        return {**answers, "outside": lab.run(*call).returncode == 0}
    finally:
        lab.shell(name, f"pkill -f 'create_server.*{port}'", check=False)
        listener.wait(timeout=40)


def test_the_interface_with_the_address_is_found_among_bridges_whatever_it_is_called(
    site: Site,
) -> None:
    for name in NAMES:
        site.shell(
            name,
            "for each in br-0123456789ab docker0 virbr0; do ip link add $each type bridge; done\n"
            "ip addr add 172.18.0.1/16 dev br-0123456789ab; ip addr add 172.17.0.1/16 dev docker0\n"
            "ip addr add 192.168.122.1/24 dev virbr0; ip link add veth0a type veth peer name veth0b\n"
            "for each in br-0123456789ab docker0 virbr0 veth0a veth0b; do ip link set $each up; done",
        )
    site.converge()
    assert site.verify()["verdict"] == "ok"
    address = nodes(site)["node1"]["address"]
    site.shell(
        "node1",
        "sed -i s/^Name=host0$/Name=bond0/ /etc/systemd/network/10-host0.network; networkctl reload\n"
        "ip link set host0 down; ip link set host0 name bond0; ip link set bond0 up\n"
        f"ip addr replace {address}/24 dev bond0",
    )
    assert ("node1", "nccl-ifname-missing") in found(site)
    site.converge()
    report = site.verify()
    assert report["verdict"] == "ok"
    (row,) = (row for row in report["identity"] if row["fact"] == "interface")
    assert row["values"] == {"node1": "bond0", "node2": "host0", "node3": "host0"} and row["ok"]
    assert site.shell("node1", "cat /etc/nccl.conf") == "NCCL_SOCKET_IFNAME==bond0\n"
    assert site.shell("node2", "cat /etc/nccl.conf") == "NCCL_SOCKET_IFNAME==host0\n"


SHUT: dict[str, str] = {
    "node1": "apt-get install -qy ufw; ufw allow 22/tcp; ufw --force enable",
    "node2": "dnf install -qy firewalld; systemctl enable -q --now firewalld; firewall-cmd -q --state",
    "node3": "nft 'add table inet site; add chain inet site input "
    "{ type filter hook input priority 0; policy drop; }'\n"
    "for rule in 'iif lo accept' 'ct state established,related accept' 'tcp dport 22 accept'; do\n"
    '  nft "add rule inet site input $rule"; done',
}
GATE = """#!/bin/sh
test ! -e /etc/firewalld/ipsets/lockstep.xml || exit 1
! grep -qs 6c6f636b73746570 /etc/ufw/user.rules || exit 1
! /usr/sbin/nft list ruleset | grep -q '"lockstep"'
"""
"""Lets nobody in while a rule of Lockstep is there: such a rule has shut the login out."""


def test_a_change_after_which_nobody_can_log_in_undoes_itself(site: Site) -> None:
    for name, script in SHUT.items():
        site.shell(name, f"{script} >/dev/null 2>&1")
    shut = {(name, "firewall-between-nodes") for name in NAMES}
    assert shut <= found(site)
    for name in NAMES:
        assert not any(reaches(site, name).values()), name
        site.shell(
            name,
            f"cat >/usr/local/sbin/gate <<'end'\n{GATE}end\nchmod 0755 /usr/local/sbin/gate\n"
            "sed -i '1i account requisite pam_exec.so quiet /usr/local/sbin/gate' /etc/pam.d/sshd",
        )
    began = time.monotonic()
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert {name for name in NAMES if f"[{name}] cannot connect" in done.stderr} == set(NAMES)
    site.wait("the rules are gone", lambda: all(gate_open(site, name) for name in NAMES), 90)
    assert time.monotonic() - began > 30, "they were there until the login had failed"
    for name in NAMES:
        site.shell(name, "sed -i '/sbin.gate$/d' /etc/pam.d/sshd; rm /usr/local/sbin/gate")
        assert not any(reaches(site, name).values()), name
    assert shut <= found(site)


def gate_open(lab: Site, name: str) -> bool:
    return lab.lockstep(
        "lab", "shell", name, "--", "/usr/local/sbin/gate"
    ).returncode == 0 and "lockstep-network" not in lab.shell(name, "ls /run")


def test_firewalld_nftables_and_ufw_let_the_other_nodes_in_and_nobody_else(
    site: Site,
) -> None:
    site.converge()
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0
    for name in NAMES:
        others = {other: True for other in NAMES if other != name}
        assert reaches(site, name) == {**others, "outside": False}


TRACES = r"""
grep -rIlE "node3|$1([^0-9]|$)" /etc /root /usr/local /var/lib/lockstep /var/lib/ufw 2>/dev/null |
  grep -vE '\.before-lockstep$|^/etc/ufw/.*\.[0-9_]+$'
nft list ruleset | grep -F "$1 "
ls -d /shared/.lockstep/nodes/*/node3.* 2>/dev/null
true
"""


def test_a_node_that_is_taken_out_of_the_file_leaves_nothing_behind(site: Site) -> None:
    declared = nodes(site)
    gone = declared.pop("node3")
    site.declare(nodes=declared)
    assert found(site) >= {
        ("node1", "hostname-unresolvable"),
        ("node1", "ssh-known-hosts"),
        ("node1", "storage-token-left"),
        ("node2", "ssh-config"),
    }
    site.converge()
    assert site.verify()["verdict"] == "ok"
    for name in declared:
        assert site.shell(name, f"set -- {gone['address']}\n{TRACES}") == ""
    assert site.converge()["totals"]["success"] == 0


def test_a_node_that_comes_back_new_is_let_in_once_its_key_is_trusted(site: Site) -> None:
    address = site.shell("node3", "ip -4 -o addr show dev host0").split()[3].partition("/")[0]
    old = site.shell("node3", "cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub").strip()
    site.shell(
        "node1",
        f"umask 077; echo 'node3,{address} {old}' >>/root/.ssh/known_hosts; "
        "ssh-keygen -q -H -f /root/.ssh/known_hosts; rm /root/.ssh/known_hosts.old",
    )
    assert site.lockstep("lab", "cut", "node3").returncode == 0
    shutil.rmtree(STATE / "nodes" / "node3")
    site.up(*with_packages(*PACKAGES), write=site.directory / "again.yaml")
    site.declare(nodes={**nodes(site), "node3": {"address": address}})
    done = site.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lockstep trust node3" in done.stderr
    trusted = site.lockstep("trust", "node3", "--yes")
    assert trusted.returncode == 0 and "pinned:" in trusted.stdout, trusted.stderr
    assert ("node1", "ssh-hostkey") in found(site)
    site.converge()
    assert site.verify()["verdict"] == "ok"
    new = site.shell("node3", "cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub").strip()
    assert new != old
    for name in NAMES:
        known = site.shell(name, "ssh-keygen -F node3 -f /etc/ssh/ssh_known_hosts | grep -v '^#'")
        assert known == f"node3,{address} {new}\n"
        assert old.split()[1] not in site.shell(
            name, "cat /root/.ssh/known_hosts 2>/dev/null; true"
        )
    assert site.shell("node1", "pdsh -w node3 uname -n") == "node3: node3\n"
    assert site.converge()["totals"]["success"] == 0


def test_a_node_is_entered_on_its_own_port_from_everywhere(site: Site) -> None:
    site.shell(
        "node2",
        "mkdir -p /etc/ssh/sshd_config.d; echo 'Port 2222' >/etc/ssh/sshd_config.d/05-port.conf; "
        "if systemctl -q is-active firewalld; then firewall-cmd -q --permanent --add-port=2222/tcp; "
        "firewall-cmd -q --reload; fi; systemctl restart sshd",
    )
    assert site.verify()["verdict"] == "unreadable"
    declared = nodes(site)
    declared["node2"]["ssh"]["port"] = 2222
    site.declare(nodes=declared)
    site.converge()
    assert site.verify()["verdict"] == "ok"
    assert site.converge()["totals"]["success"] == 0
    address = declared["node2"]["address"]
    for name in NAMES:
        assert site.shell(name, "ssh -G node2 | grep '^port '") == "port 2222\n"
        known = site.shell(name, "grep node2 /etc/ssh/ssh_known_hosts")
        assert known.startswith(f"[node2]:2222,[{address}]:2222 ssh-") and known.count("\n") == 1
    answers = site.shell("node1", f"pdsh -w node1,node2,{address},node3 uname -n").splitlines()
    assert sorted(answers) == [
        f"{address}: node2",
        "node1: node1",
        "node2: node2",
        "node3: node3",
    ]
