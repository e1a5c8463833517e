"""What a user may ask of shared storage, and where on it Lockstep and its jobs keep their files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from inventory.base import AbsolutePath, Spec
from inventory.cluster import Cluster

SYSTEM = (
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
)
"""No directory of the system is shared by mistake; ``/tmp`` is emptied at boot."""


class StorageSpec(Spec):
    """A directory that all nodes share, under the same path.

    kind: "existing" is a directory that is already mounted on every node, or exported by it.
    path: the directory, the same on every node.
    free: least free space that must be left there, in MiB.
    """

    kind: Literal["existing"]
    path: AbsolutePath
    free: Annotated[int, Field(ge=0)] = 1024

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A directory that the system itself uses cannot be the shared one."""
        if self.path in SYSTEM or self.path.startswith(("/proc/", "/sys/", "/dev/")):
            yield (
                "path",
                f"{self.path} belongs to the system: give a directory of its own, such as /shared",
            )


def shared_path(cluster: Cluster) -> str | None:
    """The directory that all nodes share; None where the cluster file declares none."""
    spec = cluster.section("storage", StorageSpec)
    return spec.path if spec else None


def depot(cluster: Cluster) -> str | None:
    """Lockstep's own directory on the shared storage (archives, wheels); None without shared storage."""
    path = shared_path(cluster)
    return f"{path}/.lockstep" if path else None
