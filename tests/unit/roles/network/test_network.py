"""The interface that really carries the address, leaks of it, MTU, routes, the firewall between nodes."""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import NewLogin, Shell
from roles.network import NetworkSpec, NetworkState, role
from roles.network.converge import (
    _firewalld,
    _no_firewalld,
    nft_script,
    take_out,
    write_conf,
)
from roles.network.interfaces import carrying, variables
from roles.network.names import meant
from roles.network.probe import Firewall, Setting, parse, probe

RECORDED = Path(__file__).parent / "recorded"
NODES = {
    "node1": Node(name="node1", address="10.77.27.11"),
    "node2": Node(name="node2", address="10.77.27.12"),
}

# As ip prints it on a machine with containers, virtual machines and bonded cards.
CROWDED = r"""own
10.0.0.1
addresses
address 127.0.0.1 lo
address 10.0.0.1 bond0
address 172.17.0.1 docker0
address 192.168.122.1 virbr0
address 10.0.1.9 eno3
links
1: lo: <LOOPBACK,UP,LOWER_UP> mtu 65536 qdisc noqueue state UNKNOWN mode DEFAULT group default qlen 1000\    link/loopback 00:00:00:00:00:00 brd 00:00:00:00:00:00
2: eno1: <BROADCAST,MULTICAST,SLAVE,UP,LOWER_UP> mtu 9000 qdisc mq master bond0 state UP mode DEFAULT group default qlen 1000\    link/ether 00:11:22:33:44:55 brd ff:ff:ff:ff:ff:ff
4: eno3: <NO-CARRIER,BROADCAST,MULTICAST,UP> mtu 1500 qdisc mq state DOWN mode DEFAULT group default qlen 1000\    link/ether 00:11:22:33:44:56 brd ff:ff:ff:ff:ff:ff
5: bond0: <BROADCAST,MULTICAST,MASTER,UP,LOWER_UP> mtu 9000 qdisc noqueue state UP mode DEFAULT group default qlen 1000\    link/ether 00:11:22:33:44:55 brd ff:ff:ff:ff:ff:ff
6: docker0: <NO-CARRIER,BROADCAST,MULTICAST,UP> mtu 1500 qdisc noqueue state DOWN mode DEFAULT group default \    link/ether 02:42:00:00:00:01 brd ff:ff:ff:ff:ff:ff
7: virbr0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc noqueue state UP mode DEFAULT group default qlen 1000\    link/ether 52:54:00:00:00:01 brd ff:ff:ff:ff:ff:ff
routes
10.0.0.2 dev bond0 src 10.0.0.1 uid 0 \    cache
files
/etc/nccl.conf	NCCL_SOCKET_IFNAME==bond0
end"""  # fmt: skip


def recorded(name: str) -> NetworkState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


RIGHT, BROKEN, BOND = recorded("bookworm-firewalled"), recorded("bookworm-broken"), parse(CROWDED)
LAB: dict[str, Any] = {"mtu": 1500, "leaks": "remove", "firewall": "open"}


def target(name: str = "node2", **declared: Any) -> Target[NetworkSpec]:
    return Target(Cluster("lab", Path("lab.yaml"), NODES), NODES[name], NetworkSpec(**declared))


def crowded(interface: str | None = None, address: str = "10.0.0.1") -> Target[NetworkSpec]:
    nodes = {
        "gpu-a": Node(name="gpu-a", address=address, interface=interface),
        "gpu-b": Node(name="gpu-b", address="10.0.0.2"),
    }
    return Target(Cluster("c", Path("c.yaml"), nodes), nodes["gpu-a"], NetworkSpec())


def found(of: Target[NetworkSpec], state: NetworkState, **peers: NetworkState) -> list[Finding]:
    return role.drift(of, state, peers)


def ids(of: Target[NetworkSpec], state: NetworkState, **peers: NetworkState) -> list[str]:
    return [finding.id for finding in found(of, state, **peers)]


def steps(of: Target[NetworkSpec], state: NetworkState) -> list[Any]:
    now = [finding for finding in found(of, state) if finding.repairable]
    return list(role.converge(of, state, {}, now))


def sh(script: str) -> str:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_right_node_has_no_findings_and_no_steps() -> None:
    assert ids(target(**LAB), RIGHT) == [] and steps(target(**LAB), RIGHT) == []
    assert ids(crowded(), BOND) == []


def test_a_broken_node_is_named_by_everything_that_is_wrong() -> None:
    assert ids(target(**LAB), BROKEN) == [
        "nccl-wrong-interface", "nccl-env-inconsistent", "firewall-between-nodes",
    ]  # fmt: skip


def test_the_interface_that_carries_the_address_is_chosen_among_bridges_and_idle_cards() -> None:
    assert BOND.interface == "bond0"
    (finding,) = found(crowded(), replace(BOND, conf=()))
    assert (finding.want, finding.repairable) == (
        "NCCL_SOCKET_IFNAME==bond0 in /etc/nccl.conf",
        True,
    )
    assert variables("bond0") == {"GLOO_SOCKET_IFNAME": "bond0", "NCCL_SOCKET_IFNAME": "=bond0"}
    node = Node(name="a", address="10.0.0.1")
    assert carrying(node, {"10.0.0.1": "bond0", "10.0.0.2": "eth0"}) == "bond0"
    assert carrying(node, {"10.0.0.2": "eth0"}) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bond0", "nccl-wrong-interface"),  # a prefix: bond0.2093 too
        ("=eno3", "nccl-wrong-interface"),
        ("=eth7", "nccl-ifname-missing"),
        ("^docker,lo", "nccl-wrong-interface"),
    ],
)
def test_another_value_in_nccl_conf_is_replaced(value: str, expected: str) -> None:
    state = replace(BOND, conf=(("NCCL_SOCKET_IFNAME", value),))
    assert ids(crowded(), state) == [expected]


def test_a_second_line_of_the_same_name_is_not_taken_for_right() -> None:
    twice = (("NCCL_SOCKET_IFNAME", "=eno3"), ("NCCL_SOCKET_IFNAME", "=bond0"))
    assert ids(crowded(), replace(BOND, conf=twice)) == ["nccl-wrong-interface"]


@pytest.mark.parametrize(
    ("of", "expected", "words"),
    [
        (crowded(address="10.9.9.9"), "nccl-wrong-interface", "10.0.0.1 on bond0"),
        (crowded("eno3"), "nccl-wrong-interface", "10.0.0.1 on bond0"),
        (crowded("eth7"), "nccl-ifname-missing", "no eth7"),
        (crowded(address="172.17.0.1"), "nccl-wrong-interface", "docker0"),
        (crowded(address="10.0.1.9"), "nccl-wrong-interface", "eno3 is down"),
    ],
)
def test_an_address_that_cannot_be_right_is_for_the_user(
    of: Target[NetworkSpec], expected: str, words: str
) -> None:
    (finding,) = found(of, BOND)
    assert (finding.id, finding.repairable) == (expected, False) and words in finding.seen


def test_an_address_on_two_interfaces_needs_a_declared_one() -> None:
    twice = parse(CROWDED.replace("address 10.0.1.9 eno3", "address 10.0.0.1 eno1"))
    (finding,) = found(crowded(), twice)
    assert "bond0, eno1" in finding.seen and not finding.repairable
    declared = parse(
        CROWDED.replace("address 10.0.1.9 eno3", "address 10.0.0.1 eno1").replace(
            "own\n10.0.0.1\n", "own\n10.0.0.1\nbond0\n"
        )
    )
    assert ids(crowded("bond0"), declared) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "10.0.0.2 via 192.168.122.9 dev virbr0 src 192.168.122.1 uid 0 \\    cache",
            "over virbr0",
        ),
        ("RTNETLINK answers: Network is unreachable\nCommand failed -:1", "not at all"),
    ],
)
def test_a_peer_that_another_interface_leads_to_is_named(line: str, words: str) -> None:
    right = "10.0.0.2 dev bond0 src 10.0.0.1 uid 0 \\    cache"
    assert right in CROWDED
    (finding,) = found(crowded(), parse(CROWDED.replace(right, line)))
    assert finding.seen == f"gpu-b {words}" and not finding.repairable


def test_leaks_are_named_and_only_taken_out_where_that_is_declared() -> None:
    named = [f for f in found(target(), BROKEN) if f.id == "nccl-env-inconsistent"]
    assert [f.repairable for f in named] == [False]
    assert named[0].seen == "'export NCCL_SOCKET_IFNAME=eno1' in /root/.bashrc"
    assert "network.leaks: remove" in named[0].fix
    removed = [f for f in found(target(leaks="remove"), BROKEN) if f.id == "nccl-env-inconsistent"]
    assert [f.repairable for f in removed] == [True]


def test_a_line_that_does_more_is_left_to_the_user_even_then() -> None:
    line = "export NCCL_SOCKET_IFNAME=eno1 PATH=$PATH:/opt/bin"
    state = replace(BOND, settings=(Setting("/root/.bashrc", line, "NCCL_SOCKET_IFNAME", "eno1"),))
    of = crowded()
    of = replace(of, spec=NetworkSpec(leaks="remove"))
    (finding,) = found(of, state)
    assert not finding.repairable and "/root/.bashrc" in finding.fix


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("NCCL_IB_DISABL", "NCCL_IB_DISABLE"),
        ("NCCL_SOCKET_IF_NAME", "NCCL_SOCKET_IFNAME"),
        ("NCCL_IB_DISABLE", None),
        ("NCCL_DEBUG", None),
        ("NCCL_SOMETHING_QUITE_NEW", None),
        ("NCCL_ASYNC_ERROR_HANDLING", None),
    ],
)
def test_misspelt_names_are_told_from_new_ones(name: str, right: str | None) -> None:
    assert meant(name) == right


def test_mtu_is_compared_with_the_head_or_set_as_declared() -> None:
    other = replace(RIGHT, links={**RIGHT.links, "host0": replace(RIGHT.links["host0"], mtu=9000)})
    bare = replace(RIGHT, mtu_unit=None)
    (finding,) = found(target(), bare, node1=other)
    assert (finding.id, finding.repairable, finding.seen) == ("mtu-mismatch", False, "1500")
    assert found(target(), bare) == [], "a head that cannot be read is no drift"
    (finding,) = found(target(mtu=9000), bare)
    assert finding.repairable and finding.disturbs
    make, again, keep, unit = steps(target(mtu=9000), bare)
    assert isinstance(again, NewLogin) and isinstance(keep, Shell)
    assert (
        "mtu 9000" in make.command and "mtu 1500" in make.command and "lockstep-mtu" in unit.command
    )


def test_a_unit_that_nobody_declares_any_more_is_taken_out() -> None:
    (step,) = steps(target(), RIGHT)
    assert "rm -f /etc/systemd/system/lockstep-mtu.service" in step.command


def test_the_firewall_is_left_alone_unless_open_is_declared() -> None:
    assert "hook input" not in probe(target())
    assert "hook input" in probe(target(firewall="open"))


def test_rules_for_the_peers_and_the_node_itself_come_first_in_a_chain_that_drops() -> None:
    assert RIGHT.firewall is not None
    (chain,) = RIGHT.firewall.chains
    own, peer, *others = chain.rules
    for rules in ((own, *others), (peer, *others), (*others, own, peer)):
        wall = replace(RIGHT.firewall, chains=(replace(chain, rules=rules),))
        assert ids(target(**LAB), replace(RIGHT, firewall=wall)) == ["firewall-between-nodes"]
    open_chain = replace(chain, rules=(), policy="accept")
    state = replace(RIGHT, firewall=replace(RIGHT.firewall, chains=(open_chain,)))
    assert ids(target(**LAB), state) == []


OLD = 'iifname "host0" ip saddr 10.77.27.99 accept comment "lockstep"'


def plain(script: str) -> str:
    """A script with the texts of the files that it writes decoded."""
    return re.sub(r"printf %s (\S+)", lambda match: base64.b64decode(match[1]).decode(), script)


def test_rules_for_a_removed_node_go_now_and_for_the_next_boot() -> None:
    assert RIGHT.firewall is not None
    (chain,) = RIGHT.firewall.chains
    right = RIGHT.firewall.boot
    idle = replace(chain, rules=(*right, OLD), policy="accept")
    for changes, words in (
        ({"chains": (replace(chain, rules=(OLD, *chain.rules)),)}, "does not let them in first"),
        ({"chains": (idle,)}, "older rules of Lockstep in chain inet site input"),
        ({"boot": (*right, OLD)}, "other rules from the next boot on"),
        ({"boot": ()}, "no rules from the next boot on"),
    ):
        state = replace(RIGHT, firewall=replace(RIGHT.firewall, **changes))
        (finding,) = found(target(**LAB), state)
        assert finding.id == "firewall-between-nodes" and words in finding.seen
        assert (
            "10.77.27.99" not in steps(target(**LAB), state)[0].command.rpartition("/dev/null")[2]
        )
    unguarded = replace(RIGHT.firewall, chains=(), boot=())
    assert ids(target(**LAB), replace(RIGHT, firewall=unguarded)) == []


def undoing(state: NetworkState) -> str:
    """What runs unless a fresh login succeeds."""
    make = steps(target(**LAB), state)[0].command
    return plain(shlex.split(make.split("printf '%s\\n' ", 1)[1])[0])


def test_the_undoing_brings_back_what_was_there_before() -> None:
    assert RIGHT.firewall is not None
    before = replace(RIGHT, firewall=replace(RIGHT.firewall, boot=(OLD,)))
    assert OLD in undoing(before) and "10.77.27.11" not in undoing(before)
    bare = replace(RIGHT, firewall=replace(RIGHT.firewall, boot=()))
    assert "lockstep-firewall undo" in undoing(bare) and "disable -q" in undoing(bare)
    other = replace(RIGHT, firewall=Firewall("ufw", frozenset({"10.77.27.99"})))
    assert undoing(other) == (
        "ufw allow from 10.77.27.99 comment lockstep\nufw delete allow from 10.77.27.11"
    )
    other = replace(RIGHT, firewall=Firewall("firewalld", frozenset({"10.77.27.99"})))
    assert "<entry>10.77.27.99</entry>" in undoing(other) and "10.77.27.11" not in undoing(other)
    none = replace(RIGHT, firewall=Firewall("firewalld"))
    assert (
        "--remove-source=ipset:lockstep; fi\nrm -f /etc/firewalld/ipsets/lockstep.xml"
        in undoing(none)
    )


def test_a_change_that_an_interrupted_run_left_unproved_is_kept_after_a_login() -> None:
    left = replace(RIGHT, undoing=True)
    assert ids(target(**LAB), left) == ["network-undo"]
    again, keep = steps(target(**LAB), left)
    assert isinstance(again, NewLogin) and isinstance(keep, Shell)
    assert "lockstep-network" in keep.command


def test_the_probe_finds_a_change_that_will_undo_itself(tmp_path: Path) -> None:
    (line,) = (line for line in probe(target()).splitlines() if "undoing" in line)
    script = line.replace("/run/", f"{tmp_path}/")
    assert sh(script) == ""
    waiting = tmp_path / "lockstep-network.a1B2c3"
    waiting.mkdir()
    assert sh(script) == ""  # kept already; its folder goes later
    (waiting / "run").touch()
    assert parse(CROWDED.replace("addresses\n", f"{sh(script)}addresses\n")).undoing
    assert not parse(CROWDED).undoing


SIX = "fd00::9"
FIREWALL_CMD = """#!/bin/sh
case $* in
  *--query-source=*) grep -q "\\"${4##*:}\\"" zones/trusted.xml ;;
  *--add-source=*) printf '<source ipset="%s"/>\\n' "${4##*:}" >> zones/trusted.xml ;;
  *--remove-source=*) sed -i "/\\"${4##*:}\\"/d" zones/trusted.xml ;;
  *--reload) for set in $(sed 's/.*="\\(.*\\)".*/\\1/' zones/trusted.xml); do test -e "ipsets/$set.xml" || exit 1; done ;;
esac
"""
"""What firewalld does with a zone's sources; it does not load a zone whose set has no file."""


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given to root")
def test_the_last_node_of_ipv6_takes_its_set_of_firewalld_along(tmp_path: Path) -> None:
    for folder in ("ipsets", "zones"):
        (tmp_path / folder).mkdir()
    (tmp_path / "firewall-cmd").write_text(FIREWALL_CMD)
    (tmp_path / "firewall-cmd").chmod(0o755)

    def run(script: str) -> None:
        text = script.replace("/etc/firewalld", str(tmp_path))
        argv = ["sh", "-c", f"cd {tmp_path}; PATH={tmp_path}:$PATH; set -e\n{text}"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def allowed() -> set[str]:
        """As the probe sees it."""
        files = "".join(path.read_text() for path in (tmp_path / "ipsets").iterdir())
        return set(re.findall("<entry>(.*)</entry>", files))

    (tmp_path / "zones/trusted.xml").touch()
    for addresses in (["10.0.0.2", SIX], ["10.0.0.2"], [SIX], ["10.0.0.2"]):
        run(_firewalld(addresses))
        assert allowed() == set(addresses)
    run(_no_firewalld())
    assert allowed() == set() and (tmp_path / "zones/trusted.xml").read_text() == ""


@pytest.mark.parametrize("kind", ["firewalld", "ufw"])
def test_firewalld_and_ufw_let_exactly_the_peers_in(kind: str) -> None:
    of = target(**LAB)
    assert ids(of, replace(RIGHT, firewall=Firewall(kind, frozenset({"10.77.27.11"})))) == []
    state = replace(RIGHT, firewall=Firewall(kind, frozenset({"10.77.27.99"})))
    (finding,) = found(of, state)
    assert "10.77.27.11" in finding.seen and "10.77.27.99" in finding.seen, "a removed node goes"
    make, again, _ = steps(of, state)
    assert isinstance(again, NewLogin)
    if kind == "ufw":
        assert "ufw allow from 10.77.27.11 comment lockstep" in make.command
        assert "ufw delete allow from 10.77.27.99" in make.command
    else:
        assert "--zone=trusted --add-source=ipset:lockstep" in make.command
    assert "sleep 60" in make.command, "it undoes itself unless the next login succeeds"


def test_the_firewalls_program_is_a_valid_script() -> None:
    script = nft_script(['iifname "host0" ip saddr 10.0.0.2 accept comment "lockstep"'])
    done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nccl_conf_keeps_other_lines_and_its_first_version(tmp_path: Path) -> None:
    conf = tmp_path / "nccl.conf"
    conf.write_text("# ours\nNCCL_SOCKET_IFNAME=eth0\nNCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=eth1")
    script = write_conf("bond0").replace("/etc/nccl.conf", str(conf))
    for _ in range(2):
        sh(script)
        assert conf.read_text() == "# ours\nNCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME==bond0\n"
    assert "=eth1" in (tmp_path / "nccl.conf.before-lockstep").read_text()


def test_a_script_stays_a_valid_script_when_its_only_line_is_taken_out(tmp_path: Path) -> None:
    bashrc = tmp_path / ".bashrc"
    bashrc.write_text("if true; then\n  export NCCL_SOCKET_IFNAME=eno1\nfi\necho fine\n")
    bashrc.chmod(0o600)
    line = "  export NCCL_SOCKET_IFNAME=eno1"
    sh(take_out(Setting(str(bashrc), line, "NCCL_SOCKET_IFNAME", "eno1")))
    assert sh(f". {bashrc}; echo ${{NCCL_SOCKET_IFNAME-unset}}") == "fine\nunset\n"
    assert bashrc.stat().st_mode & 0o777 == 0o600
    data = tmp_path / ".deepspeed_env"
    data.write_text("PATH=/bin\nNCCL_SOCKET_IFNAME=eno1\n")
    sh(take_out(Setting(str(data), "NCCL_SOCKET_IFNAME=eno1", "NCCL_SOCKET_IFNAME", "eno1")))
    assert data.read_text() == "PATH=/bin\n", "DeepSpeed cannot read a comment there"


@pytest.mark.parametrize(
    "text",
    ["", "own\n10.0.0.1", "找不到命令", "own\n10.0.0.1\naddresses\nlinks\nroutes\nfiles\nend"],
)
def test_empty_and_foreign_output_is_refused(text: str) -> None:
    with pytest.raises((Unreadable, KeyError)):
        parse(text)


def test_the_proof_is_the_heads_alone_and_a_valid_script() -> None:
    assert role.proof is not None
    assert role.proof(target("node2")) == "true"
    script = role.proof(target("node1"))
    assert "node2=10.77.27.12" in script and "29500" in script
    done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
