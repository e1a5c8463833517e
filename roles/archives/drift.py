"""Which archives some node needs and the shared storage lacks."""

from __future__ import annotations

from collections.abc import Iterator

from roles.archives.probe import ArchivesState
from roles.core.role import Finding, Peers, Target
from roles.environment.fit import misfit
from roles.environment.parcel import Parcel
from roles.environment.probe import archive_of, parcel_of
from roles.environment.spec import Environments


def drift(target: Target[Environments], state: ArchivesState, peers: Peers) -> list[Finding]:
    """Findings of the head alone; it asks the others only when an archive is not there."""
    return [
        Finding(
            "archive-unpublished",
            f"the archive of {name} on the shared storage, for {', '.join(nodes)}",
            "not there",
            "it is copied there once",
        )
        for name, nodes, _ in unpublished(target, state, peers)
    ]


def unpublished(
    target: Target[Environments], state: ArchivesState, peers: Peers
) -> Iterator[tuple[str, list[str], Parcel]]:
    """(environment, the nodes that need its archive, the archive), where nothing lies ready."""
    if not target.is_head:
        return
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        if archive is None:  # the environment role says why
            continue
        parcel = parcel_of(target.cluster, one, archive)
        shared = parcel.shared(target.cluster)
        if shared is None or shared in state.parcels:
            continue
        states = {target.node.name: state}
        states.update({node.name: peers[node.name] for node in target.others if node.name in peers})
        needing = [
            node
            for node, found in states.items()
            if found.unpacked.get(one.name) != archive.sha256
            and misfit(archive.needs, found.node) is None
        ]
        if needing:
            yield one.name, needing, parcel
