"""Which archives some node needs: those that the shared storage lacks, or that this node itself lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from roles.archives.probe import ArchivesState
from roles.core.role import Finding, Peers, Target
from roles.environment.archive import Archive
from roles.environment.fit import misfit
from roles.environment.parcel import Parcel
from roles.environment.probe import archive_of, parcel_of
from roles.environment.spec import Declared, Environments


def drift(target: Target[Environments], state: ArchivesState, peers: Peers) -> list[Finding]:
    """Findings about the shared storage are the head's; it asks the others only when an archive is not there."""
    return [*(finding for finding, _ in missing(target, state, peers)), *_keys(state)]


def missing(
    target: Target[Environments], state: ArchivesState, peers: Peers
) -> Iterator[tuple[Finding, Parcel]]:
    """Each archive that must travel, with what is wrong."""
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        if archive is None:  # the environment role says why
            continue
        parcel = parcel_of(target.cluster, one, archive)
        shared = parcel.shared(target.cluster)
        if shared is None:
            if parcel.local() not in state.parcels and _needs(state, one, archive):
                finding = Finding(
                    "archive-undelivered",
                    f"the archive of {one.name} on this node",
                    "not there",
                    "it is sent to one node, and each passes it on to the next",
                )
                yield finding, parcel
        elif target.is_head and shared not in state.parcels:
            states = {target.node.name: state}
            states.update(
                {node.name: peers[node.name] for node in target.others if node.name in peers}
            )
            needing = [node for node, found in states.items() if _needs(found, one, archive)]
            if needing:
                finding = Finding(
                    "archive-unpublished",
                    f"the archive of {one.name} on the shared storage, for {', '.join(needing)}",
                    "not there",
                    "it is copied there once",
                )
                yield finding, parcel


def _needs(state: ArchivesState, one: Declared, archive: Archive) -> bool:
    there = archive.sha256 in state.unpacked.get(one.name, ())
    return not there and misfit(archive.needs, state.node) is None


def _keys(state: ArchivesState) -> Iterable[Finding]:
    if state.stale_keys:
        yield Finding(
            "archive-relay-key",
            "no key of a past transfer in the login user's authorized_keys",
            ", ".join(sorted(state.stale_keys)),
            "its line is removed; it expires within minutes in any case",
        )
