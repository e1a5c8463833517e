"""Files that travel from the control machine to nodes: once to the shared storage, or else to the nodes.

A parcel is named by its content: it arrives beside its place, is checked there and renamed. What lies
under its name counts as it, and is checked again before it is used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inventory.cluster import Cluster
from roles.core.role import Peers, Target
from roles.core.steps import Upload, appears, quote
from roles.storage.spec import depot

LOCAL = "/var/lib/lockstep"


@dataclass(frozen=True)
class Parcel:
    """source: on the control machine. place: below the depot or /var/lib/lockstep, with the content's name.

    by_nodes: it never goes to the shared storage; one node passes it on to the next.
    """

    source: Path
    sha256: str
    place: str
    by_nodes: bool = False

    @property
    def name(self) -> str:
        """Of the file, wherever it lies."""
        return self.place.rpartition("/")[2]

    def local(self) -> str:
        """Where it lies on a node that has it for itself."""
        return f"{LOCAL}/{self.place}"

    def shared(self, cluster: Cluster) -> str | None:
        """Where it lies for all nodes; None where each has its own."""
        lockstep = None if self.by_nodes else depot(cluster)
        return f"{lockstep}/{self.place}" if lockstep else None

    def places(self, cluster: Cluster) -> list[str]:
        """Where a node may find it, best first."""
        shared = self.shared(cluster)
        return [shared, self.local()] if shared else [self.local()]


def probe(parcels: Iterable[Parcel], cluster: Cluster) -> str:
    """Shell that prints ``parcel PATH`` for each place that holds one."""
    paths = [path for parcel in parcels for path in parcel.places(cluster)]
    if not paths:
        return ""
    words = " ".join(map(quote, paths))
    return f'for p in {words}; do if [ -f "$p" ]; then printf \'parcel %s\\n\' "$p"; fi; done\n'


def deliver(
    parcel: Parcel, target: Target[Any], seen: Collection[str], peers: Peers
) -> list[Upload]:
    """The step that brings it where ``place_of`` says; none where it lies already."""
    if _lies(parcel, target, seen, peers):
        return []
    place = place_of(parcel, target, seen, peers)
    return [Upload(parcel.source, place, parcel.sha256, relayed=parcel.by_nodes)]


def place_of(parcel: Parcel, target: Target[Any], seen: Collection[str], peers: Peers) -> str:
    """Where the node finds it. Only the head writes to the shared storage: two that did would collide."""
    shared = parcel.shared(target.cluster)
    if shared and (shared in seen or shared in _of_head(target, peers) or target.is_head):
        return shared
    return parcel.local()


def notes(cluster: Cluster) -> str:
    """The folder in which the head notes what this cluster uses of the shared storage, an empty file each.

    Names of clusters are chosen without knowledge of others; heads of one storage have an address each.
    """
    return f"{depot(cluster)}/used/{cluster.name}@{cluster.head.address}"


def note(cluster: Cluster, parcel: Parcel) -> str:
    """Shell for the head that notes it, before it comes: so no other cluster removes it meanwhile."""
    folder = quote(notes(cluster))
    return f"umask 022\nmkdir -p {folder}\ntouch {folder}/{quote(parcel.name)}\n"


def intact(sha256: str, place: str) -> str:
    """Shell that comes before a parcel is used: one that was damaged where it lies ends it and goes, so
    that the next run brings it again. Both are words of the shell."""
    unseen = f'{place}" is not seen here: converge again"'
    return (
        f"{appears(place, unseen)}"
        f'if ! echo {sha256}"  "{place} | sha256sum -c --status -; then rm -f {place}\n'
        f'  echo {place}" was damaged, and is removed: converge again" >&2; exit 1; fi\n'
    )


def _lies(parcel: Parcel, target: Target[Any], seen: Collection[str], peers: Peers) -> bool:
    path = place_of(parcel, target, seen, peers)
    return path in seen or (path != parcel.local() and path in _of_head(target, peers))


def _of_head(target: Target[Any], peers: Peers) -> Collection[str]:
    """What the head sees now: it may have published since this node was looked at."""
    if target.is_head:
        return ()
    head = peers.get(target.cluster.head.name)
    found: Collection[str] = head.parcels if head is not None else ()
    return found
