"""The lab finds a network that is free, and touches no link that is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.lab import network
from deploy.lab.errors import LabError
from deploy.lab.state import Record

STATE = Path("/srv/lab")


def link(name: str, address: str = "", alias: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"ifname": name, "addr_info": []}
    if alias:
        found["ifalias"] = alias
    if address:
        local, prefix = address.split("/")
        family = "inet6" if ":" in local else "inet"
        found["addr_info"] = [{"family": family, "local": local, "prefixlen": int(prefix)}]
    return found


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ([link("eth0", "192.168.1.5/24"), link("lo", "127.0.0.1/8")], set()),
        ([link("eth0", "10.77.3.9/24")], {3}),
        ([link("eth0", "10.77.3.9/30")], {3}),
        ([link("docker0", "10.77.4.1/22")], {4, 5, 6, 7}),
        ([link("vpn0", "10.0.0.7/8")], set()),
        ([link("eth0", "fd00::1/64")], set()),
        ([link("lockstep5", alias="/srv/other")], {5}),
        ([link("lockstep5", "10.77.5.1/24", alias="/srv/lab")], set()),
        ([link("lockstepx")], set()),
    ],
)
def test_networks_of_others_are_taken_and_the_lab_s_own_is_not(
    found: list[dict[str, Any]], taken: set[int]
) -> None:
    assert network.taken_indexes(found, STATE) == taken


def test_a_wide_network_takes_every_number_that_it_overlaps() -> None:
    assert network.taken_indexes([link("eth0", "10.77.0.1/16")], STATE) == set(range(256))
    assert network.taken_indexes([link("eth0", "10.64.0.1/10")], STATE) == set(range(256))


def test_a_bridge_whose_alias_was_not_yet_set_is_ours_only_if_the_record_says_so() -> None:
    unfinished = [link("lockstep5", "10.77.5.1/24")]
    assert network.taken_indexes(unfinished, STATE, 5) == set()
    assert network.taken_indexes(unfinished, STATE, 6) == {5}
    assert network.taken_indexes(unfinished, STATE) == {5}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []

    def run(argv: list[str]) -> str:
        ran.append(" ".join(argv))
        return ""

    monkeypatch.setattr(network, "run", run)
    return ran


def test_a_new_bridge_gets_alias_mtu_and_address(
    monkeypatch: pytest.MonkeyPatch, commands: list[str]
) -> None:
    monkeypatch.setattr(network, "links", list)
    network.ensure_bridge(Record(5), STATE)
    assert commands == [
        "ip link add name lockstep5 type bridge",
        "ip link set lockstep5 alias /srv/lab",
        "ip link set lockstep5 mtu 1500 addrgenmode none up",
        "ip address replace 10.77.5.1/24 dev lockstep5",
    ]


def test_a_bridge_of_somebody_else_is_neither_used_nor_removed(
    monkeypatch: pytest.MonkeyPatch, commands: list[str]
) -> None:
    monkeypatch.setattr(network, "links", lambda: [link("lockstep5", alias="/srv/other")])
    with pytest.raises(LabError, match="lockstep5 exists and belongs to /srv/other"):
        network.ensure_bridge(Record(5), STATE)
    network.remove_bridge(Record(5), STATE)
    assert commands == []


def test_the_node_s_network_file_is_static_and_has_no_way_out() -> None:
    text = network.network_file("10.77.5.12", "host0")
    assert "Address=10.77.5.12/24\n" in text
    assert "MTUBytes=1500\n" in text
    assert "DHCP=no\n" in text
    assert not any(word in text for word in ("Gateway", "DNS", "Masquerade", "Forward"))


@pytest.mark.parametrize(("content", "filtered"), [("1\n", True), ("0\n", False), (None, False)])
def test_filtering_of_bridged_traffic_is_read_not_set(
    tmp_path: Path, content: str | None, filtered: bool
) -> None:
    sysctl = tmp_path / "bridge-nf-call-iptables"
    if content is not None:
        sysctl.write_text(content)
    assert network.filtered_bridge(sysctl) is filtered
