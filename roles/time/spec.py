"""What a user may ask of the nodes' clocks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from inventory.base import Spec
from inventory.cluster import Cluster

SERVER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?")


def _server(text: str) -> str:
    if not SERVER.fullmatch(text):
        raise ValueError(f"{text!r} is no time server: give its host name or IP address")
    return text


class TimeSpec(Spec):
    """One clock for all nodes: chrony on each, and every node follows the head.

    The nodes need to agree with each other more than with the world, and often cannot reach it. So
    the head keeps the time, by its own clock where nothing else is declared or nothing answers.
    """

    servers: list[Annotated[str, AfterValidator(_server)]] = Field(default_factory=list)
    """Time servers that the head follows while one of them answers."""

    max_offset: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Most that a node's clock may be off the head's, in seconds. An elastic rendezvous drops a
    node whose clock is 15 s off."""

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A node cannot be the source of its own time."""
        for number, server in enumerate(self.servers):
            for node in cluster.nodes.values():
                if server in (node.name, node.address):
                    yield (
                        f"servers[{number}]",
                        f"{server} is a node of this cluster: name servers outside it, or leave the list "
                        "empty and the head keeps the time",
                    )
