"""The interface that carries a node's declared address, and what the libraries are told of it.

The one home of this: the network role writes it to ``/etc/nccl.conf``, the job role gives it to the
processes that it starts. The name may be another on every node: bond0 here, eno1 there.
"""

from __future__ import annotations

from collections.abc import Mapping

from inventory.cluster import Node

SHOW = r"""
found=$(ip -o addr show) || exit 3
printf '%s\n' "$found" | awk '{ sub(/@.*/, "", $2); sub(/\/.*/, "", $4); print "address", $4, $2 }'
"""
"""Shell that prints ``address ADDRESS INTERFACE`` for each address of the node."""


def pair(value: str) -> tuple[str, str]:
    """Address and interface of a line, its first word taken off. Raises ValueError."""
    address, name = value.split(" ")
    return address, name


def carrying(node: Node, interfaces: Mapping[str, str]) -> str | None:
    """The interface that the peers reach: the declared one, or the one that carries the address.

    interfaces: address to interface, as the node shows them.
    """
    return node.interface or interfaces.get(node.address)


def exactly(interface: str) -> str:
    """The interface in NCCL's words: a bare name is a prefix, so that eth0 would be eth01 too."""
    return f"={interface}"


def variables(interface: str) -> dict[str, str]:
    """What processes are told of their node's interface; never the same for all nodes."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": exactly(interface)}
