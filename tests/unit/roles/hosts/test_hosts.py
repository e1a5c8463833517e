"""/etc/hosts: every name of the cluster leads to its declared address, and nothing else is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target, Unreadable
from roles.core.steps import Shell
from roles.hosts.converge import converge
from roles.hosts.drift import drift, right_text
from roles.hosts.probe import HostsState, parse, probe
from roles.hosts.spec import HostsSpec

NODES = {
    name: Node(name=name, address=f"10.77.0.1{number}")
    for number, name in enumerate(("node1", "node2"), 1)
}
TARGET = Target(Cluster("lab", Path("lab.yaml"), NODES), NODES["node1"], HostsSpec())
DEBIAN = "127.0.0.1\tlocalhost\n127.0.1.1\tnode1\n::1 localhost ip6-localhost"
PEERS = {"node2": HostsState("node2", "", False)}


def right(text: str = DEBIAN, peers: Mapping[str, HostsState] = PEERS) -> HostsState:
    fixed, _ = right_text(TARGET, HostsState("node1", text, False), peers)
    return HostsState("node1", fixed.rstrip("\n"), False)


def ids(state: HostsState, peers: Mapping[str, HostsState] = PEERS) -> list[str]:
    return [finding.id for finding in drift(TARGET, state, peers)]


def test_a_fresh_debian_node_misses_the_entries_and_resolves_itself_to_loopback() -> None:
    assert ids(HostsState("node1", DEBIAN, False)) == ["hostname-unresolvable", "hostname-loopback"]


def test_what_converge_writes_has_no_drift_left_and_keeps_the_other_lines() -> None:
    state = right()
    assert ids(state) == []
    assert "127.0.1.1" not in state.text
    assert "::1 localhost ip6-localhost" in state.text
    assert "10.77.0.12 node2" in state.text.splitlines()


def test_a_loopback_line_with_other_names_loses_only_the_nodes_name() -> None:
    assert "127.0.1.1 printer" in right("127.0.1.1 node1 printer").text.splitlines()


def test_another_address_for_a_node_is_a_conflict() -> None:
    state = right()
    assert ids(HostsState("node1", f"10.0.0.9 node2\n{state.text}", False)) == ["hosts-conflict"]


@pytest.mark.parametrize("unset", ["localhost", "localhost.localdomain"])
def test_a_host_name_that_was_never_set_is_no_name_of_the_node(unset: str) -> None:
    state = HostsState(unset, "127.0.0.1 localhost localhost.localdomain", False)
    fixed, strays = right_text(TARGET, state, PEERS)
    assert "127.0.0.1 localhost localhost.localdomain\n" in fixed and not strays
    assert f"10.77.0.11 node1 {unset}" not in fixed


def test_a_missing_file_is_empty_and_not_unreadable(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", probe(TARGET).replace("/etc/hosts", str(tmp_path / "hosts"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert parse(done.stdout.strip("\n")).text == ""


def test_a_node_that_was_taken_out_of_the_file_leaves_the_block() -> None:
    state = right()
    old = state.text.replace("10.77.0.12 node2", "10.77.0.12 node2\n10.77.0.13 node3")
    assert ids(HostsState("node1", old, False)) == ["hostname-unresolvable"]
    assert "node3" not in right(old).text


def test_a_peers_own_host_name_is_named_too() -> None:
    peers = {"node2": HostsState("gpu-b.example", "", False)}
    assert "10.77.0.12 node2 gpu-b.example" in right(peers=peers).text.splitlines()


def test_a_dead_peer_changes_nothing_on_the_living() -> None:
    named = right(peers={"node2": HostsState("gpu-b.example", "", False)})
    assert ids(named, peers={}) == []


def test_two_nodes_with_one_host_name_are_for_the_user_to_mend() -> None:
    twins = {"node2": HostsState("node1", "", False)}
    found = [
        finding
        for finding in drift(TARGET, right(peers=twins), twins)
        if finding.id == "duplicate-hostname"
    ]
    assert len(found) == 1 and not found[0].repairable and "hostnamectl" in found[0].fix


def test_cloud_init_is_told_to_leave_the_file_alone() -> None:
    state = HostsState("node1", right().text, True)
    findings = drift(TARGET, state, PEERS)
    assert [finding.id for finding in findings] == ["cloud-init-hosts"]
    steps = list(converge(TARGET, state, PEERS, findings))
    assert (
        len(steps) == 1
        and isinstance(steps[0], Shell)
        and "99-lockstep-hosts.cfg" in steps[0].command
    )


def test_the_parser_reads_the_probe_and_refuses_less() -> None:
    assert parse("node1\nno\n127.0.0.1 localhost\n\nend") == HostsState(
        "node1", "127.0.0.1 localhost", False
    )
    with pytest.raises(Unreadable):
        parse("node1\nend")
