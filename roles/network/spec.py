"""What a user may ask of the network between the nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from inventory.base import Spec


class NetworkSpec(Spec):
    """Nothing need be declared: the interface of each node is found by the node's address."""

    mtu: Annotated[int, Field(ge=1280, le=65535)] | None = None
    """Largest packet of the interface, in bytes, now and after a reboot. None: as the nodes have it;
    nodes that differ are named."""

    leaks: Literal["name", "remove"] = "name"
    """Start-up files that give every process an interface, or a misspelt variable: name them, or take
    those lines out (a copy of the file stays beside it)."""

    firewall: Literal["leave", "open"] = "leave"
    """``open``: every node accepts whatever comes from the addresses of the other nodes, and from
    nobody else. NCCL and gloo use random ports, so single ports would not do."""
