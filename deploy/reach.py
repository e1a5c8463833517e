"""Opens pyinfra's connections to the declared nodes without its command line, for ``verify``, ``status`` and the like.

The looks, the roles and the shell are the same as in a converging run. Nothing here changes a node.
"""

# ruff: noqa: E402
from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # before paramiko is imported: it must wait in gevent's way, not block every node

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import gevent
from pyinfra.api import Config, Inventory, State
from pyinfra.api.host import Host

from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from inventory.pyinfra_hosts import hosts
from roles import registry
from roles.converge import Run

R = TypeVar("R")


class Reached:
    """The cluster's nodes behind their connections, opened as they are needed."""

    def __init__(self, cluster: Cluster, state: State) -> None:
        self.cluster = cluster
        self.state = state
        self.run = Run(cluster, registry.ROLES)

    @property
    def nodes(self) -> list[Host]:
        """One pyinfra host for each node, in the order of the file."""
        return [self.state.inventory.get_host(name) for name in self.cluster.nodes]

    def each(self, what: Callable[[Host], R], nodes: Sequence[Host] | None = None) -> dict[str, R]:
        """Do something on all nodes at the same time. The results, by node name, in file order.

        Raises the InventoryProblem of the first node that met one.
        """
        chosen = self.nodes if nodes is None else list(nodes)
        jobs = {node.name: gevent.spawn(_tried, what, node) for node in chosen}
        gevent.joinall(list(jobs.values()), raise_error=True)
        problem = next((job.value[1] for job in jobs.values() if job.value[1]), None)
        if problem is not None:
            raise problem
        return {name: job.value[0] for name, job in jobs.items()}


def _tried(what: Callable[[Host], R], node: Host) -> tuple[R | None, InventoryProblem | None]:
    """A user's mistake as a value: gevent prints the traceback of whatever a greenlet raises."""
    try:
        return what(node), None
    except InventoryProblem as problem:
        return None, problem


@contextmanager
def reach(cluster: Cluster) -> Iterator[Reached]:
    """Connections that last as long as the block. Raises InventoryProblem for a wrong password file."""
    inventory = Inventory((hosts(cluster), {}))
    state = State(inventory, Config(PARALLEL=len(cluster.nodes) + 1, CONNECT_TIMEOUT=10))
    reached = Reached(cluster, state)
    try:
        yield reached
    finally:
        for node in reached.nodes:
            if node.connected:
                node.disconnect()
