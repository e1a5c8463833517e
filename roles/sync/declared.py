"""What is kept the same on every node: directories below the storage that each node has on its own disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from inventory.cluster import Cluster
from inventory.settings import state_directory
from roles.fetch.spec import FetchSpec
from roles.storage.spec import Origin, StorageSpec, origin

NOTES = "/var/lib/lockstep/sync"
"""On a node: what it knows of each directory."""


@dataclass(frozen=True)
class Entry:
    """One directory. name: in words. key: names its notes. place: where it lies on every node."""

    name: str
    key: str
    origin: Origin
    place: str

    @property
    def notes(self) -> str:
        """The folder of its manifests on a node."""
        return f"{NOTES}/{self.key}"

    def here(self, cluster: Cluster) -> Path:
        """The folder of its manifest on the control machine."""
        return state_directory() / "sync" / cluster.name / self.key

    def beside(self, what: str) -> str:
        """A folder beside its place, on the same file system."""
        place = PurePosixPath(self.place)
        return f"{place.parent}/.{place.name}.{what}"

    def is_given_by(self, node: str) -> bool:
        """The node's own directory in that place is what the others get."""
        return self.origin.node == node and self.origin.path == self.place


def entries(cluster: Cluster) -> list[Entry]:
    """What is declared under ``sync``, and what the head fetched, which then comes from there."""
    spec = cluster.section("storage", StorageSpec)
    if spec is None or spec.kind != "local":
        return []
    found = [
        Entry(name, f"declared/{name}", origin(one, cluster), f"{spec.path}/{name}")
        for name, one in spec.sync.items()
    ]
    fetch = cluster.section("fetch", FetchSpec)
    if fetch is None or fetch.manage == "unmanaged" or len(cluster.nodes) == 1:
        return found
    return found + [
        Entry(one.name, f"fetched/{one.name}", Origin(cluster.head.name, one.path), one.path)
        for one in fetch.each(cluster)
    ]
