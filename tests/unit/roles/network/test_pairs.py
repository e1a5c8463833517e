"""The proof of every ordered pair of nodes, on real packets: each node is a network namespace behind one bridge.

A namespace lives as long as the process that holds it, which ends with the tests whatever becomes of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target, proved_wrong
from roles.network import NetworkSpec, role

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are made")

NODES = {name: Node(name=name, address=f"10.77.9.1{name[-1]}") for name in ("n1", "n2", "n3")}
RENDEZVOUS, LISTENING = "29500", "40000-49999"

# What a node says when it is called (-n), and what it hears, lies on ports apart: a rule can tell them.
SSH = r"""#!/bin/sh
ports='40000 49999'
while test "${1#-}" != "$1"; do
  if test "$1" = -n; then ports='50000 59999'; shift; else shift 2; fi
done
name=$1; shift
. "${0%/*}/$name"
exec /usr/bin/nsenter -t "$holder" -n /bin/sh -c "echo $ports >/proc/sys/net/ipv4/ip_local_port_range; $*"
"""


@dataclass(frozen=True)
class Net:
    """folder: the stand-in for ssh, and a script for each node that it reads. holders: of the namespaces."""

    folder: Path
    holders: dict[str, int]

    def inside(self, name: str, command: Sequence[str] | str) -> str:
        """Run this in a node's namespace, or on the bridge's side of it."""
        words = ["sh", "-c", command] if isinstance(command, str) else command
        inner = ["nsenter", "-t", str(self.holders[name]), "-n", *words]
        done = subprocess.run(inner, capture_output=True, text=True, timeout=60, env=self.variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def variables(self) -> dict[str, str]:
        return {"PATH": f"{self.folder}:/usr/sbin:/usr/bin:/sbin:/bin"}

    def when_entered(self, name: str, script: str) -> None:
        """Have ssh do this first when it enters the node."""
        (self.folder / name).write_text(f"holder={self.holders[name]}\n{script}\n")

    def turn_away(self, caller: str, called: str, ports: str, how: str = "prohibit") -> None:
        """As a firewall of the called node does: REJECT, or DROP ("blackhole")."""
        source = NODES[caller].address
        rule = f"ip rule add pref 5 from {source} ipproto tcp dport {ports} {how}"
        self.inside(called, rule)

    def proved(self, firewall: str = "leave") -> list[tuple[str, str, str]]:
        """Each finding's id, sentence and fix."""
        spec = NetworkSpec.model_validate({"firewall": firewall})
        target = Target(Cluster("net", Path("net.yaml"), NODES), NODES["n1"], spec)
        assert role.proof is not None
        text = self.inside("n1", ["sh", "-c", role.proof(target)])
        return [(each.id, each.seen, each.fix) for each in proved_wrong(text)]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    holding = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "-n",
        "sh",
        "-c",
        "echo; exec sleep 600",
    ]
    held = {name: subprocess.Popen(holding, stdout=subprocess.PIPE) for name in ("bridge", *NODES)}
    try:
        for each in held.values():
            assert each.stdout is not None and each.stdout.readline() == b"\n"
        net = Net(tmp_path, {name: each.pid for name, each in held.items()})
        net.inside("bridge", "ip link add bridge type bridge && ip link set bridge up")
        for name, node in NODES.items():
            net.inside(
                "bridge",
                f"ip link add name {name} type veth peer name lan netns {net.holders[name]} && "
                f"ip link set {name} master bridge up",
            )
            # One packet is one segment, as on a wire; rules come before the table of own addresses.
            net.inside(
                name,
                f"ip link set lo up; ip link set lan gso_max_segs 1 up; ip addr add {node.address}/24 dev lan\n"
                "ip rule add pref 10 lookup local; ip rule del pref 0; sysctl -qw net.ipv4.ip_forward=1",
            )
            net.when_entered(name, "")
        (tmp_path / "ssh").write_text(SSH)
        (tmp_path / "ssh").chmod(0o755)
        yield net
    finally:
        for each in held.values():
            each.kill()
            each.communicate()


def test_nodes_that_reach_each_other_are_right_whatever_a_login_prints(net: Net) -> None:
    net.when_entered("n2", "printf 'Welcome\\tto n2\\n\\n'; echo banner >&2")
    assert net.proved() == []


def test_what_turns_one_away_is_named_for_that_ordered_pair_and_port(net: Net) -> None:
    net.turn_away("n1", "n3", LISTENING)
    net.turn_away("n2", "n1", RENDEZVOUS, "blackhole")
    found = net.proved()
    random, rendezvous = sorted(said for _, said, _ in found)
    start, _, said = random.partition("port 4")
    assert start == "n1 does not reach n3 at 10.77.9.13, " and said[4:] == ": No route to host"
    assert rendezvous == "n2 does not reach n1 at 10.77.9.11, port 29500: no answer"
    assert {id for id, _, _ in found} == {"firewall-between-nodes"}
    assert all(fix.startswith("declare network.firewall as open") for _, _, fix in found)


def test_big_packets_that_are_lost_on_the_way_are_named_for_each_pair(net: Net) -> None:
    net.inside("bridge", "ip link set n2 mtu 1000")
    found = net.proved()
    assert {id for id, _, _ in found} == {"mtu-mismatch"}
    assert [said.split(" at ")[0] for _, said, _ in found] == [
        *("n1 reaches n2", "n2 reaches n1", "n2 reaches n3", "n3 reaches n2")
    ]
    assert found[0][1].endswith("big packets are lost on the way") and "network.mtu" in found[0][2]


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("exec sleep 5", "because it does not listen at 10.77.9.12: no answer within 1 s"),
        ("PATH=/none", "because it does not listen at 10.77.9.12: no Python there"),
        ("echo 'Connection closed by n2' >&2; exit 255", "listen at 10.77.9.12: Connection closed by n2"),
        ("nsenter -t $holder -n ip addr flush dev lan", "listen at 10.77.9.12: [Errno 99] Cannot assign requested address"),
        (
            "test \"$ports\" = '40000 49999' || { echo Killed >&2; exit 137; }",
            "ended half way when it called the others: Killed",
        ),
    ],
    ids=["silent", "no Python", "closed", "no address", "half way"],
)  # fmt: skip
def test_a_node_that_cannot_take_part_is_named_and_the_others_are_proved(
    net: Net, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    monkeypatch.setattr(sys.modules["roles.network.proof"], "ANSWER_SECONDS", 1)
    net.turn_away("n3", "n1", RENDEZVOUS)
    net.when_entered("n2", script)
    (other, said, wall), (id, left_out, fix) = sorted(net.proved("open"))
    assert (id, other) == ("network-unproved", "firewall-between-nodes")
    assert said == "n3 does not reach n1 at 10.77.9.11, port 29500: No route to host"
    assert left_out.startswith("n2 ") and left_out.endswith(why)
    assert "python3" in fix and "rules of iptables there" in wall
