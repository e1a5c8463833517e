"""The lab's bridge and the nodes' addresses: one 10.77.N.0/24 network, no gateway, no NAT, no forwarding.

The bridge carries the state directory as its alias, which is how two labs tell their bridges apart.
Nothing here changes a setting of the host outside the bridge itself.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploy.lab.commands import run
from deploy.lab.errors import LabError
from deploy.lab.state import Record

MTU = 1500
LAB_NETWORK = ipaddress.IPv4Network("10.77.0.0/16")


def links() -> list[dict[str, Any]]:
    """Every link of this machine with its addresses, as ``ip -json`` describes them."""
    value: list[dict[str, Any]] = json.loads(
        run(["ip", "-json", "-details", "address", "show"]) or "[]"
    )
    return value


def taken_indexes(
    found: Iterable[dict[str, Any]], state: Path, index: int | None = None
) -> set[int]:
    """Numbers of lab networks that something else on this machine uses: another lab or a real interface.

    index: the number that this lab has already.
    """
    taken: set[int] = set()
    for link in found:
        if is_ours(link, state, index):
            continue
        name = str(link.get("ifname", ""))
        if name.startswith("lockstep") and name[len("lockstep") :].isdigit():
            taken.add(int(name[len("lockstep") :]))
        for entry in link.get("addr_info", []):
            if entry.get("family") == "inet":
                taken |= _lab_networks(f"{entry['local']}/{entry['prefixlen']}")
    return taken


def _lab_networks(interface: str) -> set[int]:
    """The numbers of the lab networks that an interface's network overlaps; a whole 10.0.0.0/8 counts as none."""
    network = ipaddress.IPv4Network(interface, strict=False)
    if network.prefixlen <= 8 or not network.overlaps(LAB_NETWORK):
        return set()
    base = int(LAB_NETWORK.network_address) >> 8
    first = (int(network.network_address) >> 8) - base
    last = (int(network.broadcast_address) >> 8) - base
    return set(range(max(0, first), min(255, last) + 1))


def is_ours(link: dict[str, Any], state: Path, index: int | None) -> bool:
    """Whether a link is the bridge of the lab in that state directory.

    The alias is set after the bridge is made, so a bridge of our number without one is ours too.
    """
    alias = str(link.get("ifalias", ""))
    unfinished = index is not None and link.get("ifname") == f"lockstep{index}" and not alias
    return alias == str(state) or unfinished


def ensure_bridge(record: Record, state: Path) -> None:
    """Make the bridge, or finish one that an earlier command began.

    Raises LabError when a link of that name belongs to somebody else.
    """
    found = {str(link["ifname"]): link for link in links()}
    bridge = found.get(record.bridge)
    if bridge is None:
        run(["ip", "link", "add", "name", record.bridge, "type", "bridge"])
    elif not is_ours(bridge, state, record.index):
        raise LabError(
            f"the link {record.bridge} exists and belongs to {bridge.get('ifalias') or 'something else'}: "
            "remove it, or take this lab down and up again to get another network"
        )
    run(["ip", "link", "set", record.bridge, "alias", str(state)])
    run(["ip", "link", "set", record.bridge, "mtu", str(MTU), "addrgenmode", "none", "up"])
    run(["ip", "address", "replace", f"{record.gateway}/24", "dev", record.bridge])


def remove_bridge(record: Record, state: Path) -> None:
    """Remove the lab's own bridge; one of another owner stays."""
    for link in links():
        if link["ifname"] == record.bridge and is_ours(link, state, record.index):
            remove_link(record.bridge)


def remove_link(name: str) -> bool:
    """Delete a link if there is one; its other end goes with it."""
    if not Path("/sys/class/net", name).exists():
        return False
    with contextlib.suppress(LabError):
        run(["ip", "link", "delete", name])
    return not Path("/sys/class/net", name).exists()


def attach(name: str, bridge: str) -> None:
    """Have a running node's link on the bridge; the bridge may have been made anew since it booted."""
    port = Path("/sys/class/net", name)
    if port.exists() and (port / "master").resolve().name != bridge:
        run(["ip", "link", "set", name, "master", bridge, "up"])


def network_file(address: str, interface: str) -> str:
    """The node's systemd-networkd file: static address on its one interface, nothing from outside."""
    return (
        f"[Match]\nName={interface}\n\n"
        f"[Link]\nMTUBytes={MTU}\nRequiredForOnline=no\n\n"
        f"[Network]\nAddress={address}/24\n"
        "DHCP=no\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLDP=no\nEmitLLDP=no\n"
    )


def filtered_bridge(sysctl: Path = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")) -> bool:
    """Whether this machine sends bridged traffic through its firewall (usual once Docker runs)."""
    try:
        return sysctl.read_text().strip() == "1"
    except OSError:
        return False
