"""What a user may ask of InfiniBand and RoCE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from inventory.base import AbsolutePath, NodeName, Spec
from inventory.cluster import Cluster


class FabricSpec(Spec):
    """Adapters for remote direct memory access, between all nodes or none."""

    subnet_manager: NodeName | None = None
    """The node that runs opensm, for a fabric whose switches run no subnet manager. Every InfiniBand
    subnet needs one, two machines back to back too; RoCE needs none. On all other nodes it is switched
    off. None: opensm is left alone everywhere."""

    rdma: Literal["auto", "off"] = "auto"
    """``auto``: NCCL uses the adapters where every node of a job has one; ``off``: it uses plain sockets."""

    sysfs: AbsolutePath = "/sys"
    """Root of the tree in which the kernel shows adapters; a recorded tree serves for trials."""

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """The subnet manager is a node of this file."""
        if self.subnet_manager is not None and self.subnet_manager not in cluster.nodes:
            yield (
                "subnet_manager",
                f"{self.subnet_manager} is no node of this file: name one of {', '.join(cluster.nodes)}",
            )
