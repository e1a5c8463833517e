"""Whether NCCL may use InfiniBand, and what its processes are told of it.

The one home of this: the fabric role judges the adapters, the job role tells its processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from inventory.cluster import Cluster
from roles.core.steps import quote
from roles.fabric.spec import FabricSpec


def declared(cluster: Cluster) -> FabricSpec:
    """The section of the cluster file, or the defaults."""
    return cluster.section("fabric", FabricSpec) or FabricSpec()


def show(cluster: Cluster) -> str:
    """Shell that prints ``adapter NAME`` for each adapter of the node; no fork."""
    return (
        f"for each in {quote(declared(cluster).sysfs)}/class/infiniband/*/; do\n"
        '  if test -d "$each"; then each=${each%/}; echo "adapter ${each##*/}"; fi\ndone'
    )


def usable(cluster: Cluster, adapters: Iterable[Sequence[str]]) -> bool:
    """Whether the nodes of a job may use their adapters: only if each has one, and the user agrees.

    adapters: those of each node. One node on sockets and another on InfiniBand never meet.
    """
    return declared(cluster).rdma == "auto" and all(adapters)


def variables(infiniband: bool) -> dict[str, str]:
    """What processes are told: without adapters NCCL need not look for any, nor wait for them."""
    return {} if infiniband else {"NCCL_IB_DISABLE": "1"}
