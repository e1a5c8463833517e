"""Which archives some node needs: those that the shared storage lacks, or that this node itself lacks.

A source on the shared storage that the control machine cannot see is read first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from roles.archives.probe import ArchivesState
from roles.core.progress import MB
from roles.core.role import Finding, Peers, Target
from roles.environment.archive import Archive
from roles.environment.fit import misfit
from roles.environment.parcel import Parcel
from roles.environment.probe import archive_of, parcel_of
from roles.environment.sources import last_read
from roles.environment.spec import Declared, Environments, on_shared


@dataclass(frozen=True)
class Missing:
    """An archive that must travel or be read. place: its source's on the shared storage, where only nodes see it.

    parcel: what travels from here; None where the head takes it from its place.
    """

    finding: Finding
    one: Declared
    place: str | None
    parcel: Parcel | None


def drift(target: Target[Environments], state: ArchivesState, peers: Peers) -> list[Finding]:
    """Findings about the shared storage are the head's; it asks the others only when an archive is not there."""
    found = [each.finding for each in missing(target, state, peers)]
    return [*found, *_notes(target, state), *_keys(state)]


def first(target: Target[Environments], state: ArchivesState, peers: Peers) -> str | None:
    """The head, while it has to read what decides what the other nodes are asked."""
    unread = (_unread(target, state, one) for one in target.spec.each())
    return target.cluster.head.name if not target.is_head and any(unread) else None


def missing(target: Target[Environments], state: ArchivesState, peers: Peers) -> Iterator[Missing]:
    """Each archive that must travel or be read, with what is wrong."""
    for one in target.spec.each():
        place = on_shared(target.cluster, one)
        if unread := _unread(target, state, one):
            yield Missing(unread, one, place, None)
            continue
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
                yield Missing(finding, one, place, parcel)
        elif target.is_head and shared not in state.parcels:
            states = {target.node.name: state}
            states.update(
                {node.name: peers[node.name] for node in target.others if node.name in peers}
            )
            needing = [node for node, found in states.items() if _needs(found, one, archive)]
            if needing:
                gone = place is not None and one.name not in state.sources
                finding = Finding(
                    "archive-unpublished",
                    f"the archive of {one.name} on the shared storage, for {', '.join(needing)}",
                    f"not there, and {place} is gone" if gone else "not there",
                    f"put {place} there again" if gone else "it is copied there once",
                    repairable=not gone,
                )
                yield Missing(finding, one, place, None if place else parcel)


def _unread(target: Target[Environments], state: ArchivesState, one: Declared) -> Finding | None:
    """A source on the shared storage that must be read: it never was, or the head sees another by now."""
    place = on_shared(target.cluster, one)
    if place is None:
        return None
    known, identity = last_read(target.cluster, place), state.sources.get(one.name)
    want = f"{place} on the shared storage read, for {one.name}"
    if target.is_head and identity is None and known is None:
        kind = "archive" if one.spec.archive is not None else "directory"
        return Finding(
            "archive-unread",
            want,
            f"there is no such {kind}, neither on {target.node.name} nor on this machine",
            f"put it there, or correct environments.{one.name}",
            repairable=False,
        )
    changed = identity is not None and known is not None and known[0] != identity
    if known is None or changed:
        seen = "changed since it was read" if changed else "not read yet"
        return Finding("archive-unread", want, seen, "it is read once, by way of the head")
    return None


def unnoted(target: Target[Environments], state: ArchivesState) -> list[Parcel]:
    """Archives that lie on the shared storage and are used by this cluster, as its head did not note yet."""
    used = (parcel for parcel in _parcels(target) if parcel.shared(target.cluster) in state.parcels)
    return [parcel for parcel in used if target.is_head and parcel.name not in state.noted]


def unused(target: Target[Environments], state: ArchivesState) -> Mapping[str, int]:
    """Archives that this cluster uses no more, with their bytes; none while some environment's is not known."""
    known = (
        archive_of(target.cluster, one) and not _unread(target, state, one)
        for one in target.spec.each()
    )
    return state.unused if all(known) else {}


def _parcels(target: Target[Environments]) -> Iterator[Parcel]:
    for one in target.spec.each():
        if archive := archive_of(target.cluster, one):
            yield parcel_of(target.cluster, one, archive)


def _notes(target: Target[Environments], state: ArchivesState) -> Iterator[Finding]:
    if lacking := unnoted(target, state):
        yield Finding(
            "archive-unnoted",
            f"a note on the shared storage that {target.cluster.name} uses "
            + ", ".join(parcel.name for parcel in lacking),
            "none",
            "it is left there, so that no other cluster removes what this one uses",
        )
    if left := unused(target, state):
        yield Finding(
            "archive-unused",
            f"no archive on the shared storage that only earlier environments of {target.cluster.name} used",
            ", ".join(f"{name} ({size // MB} MB)" for name, size in sorted(left.items())),
            "what no other cluster of this storage uses is removed",
        )


def _needs(state: ArchivesState, one: Declared, archive: Archive) -> bool:
    there = archive.sha256 in state.unpacked.get(one.name, ())
    return not there and misfit(archive.needs_of(one.spec.imports), state.node) is None


def _keys(state: ArchivesState) -> Iterable[Finding]:
    if state.stale_keys:
        yield Finding(
            "archive-relay-key",
            "no key of a past transfer in the login user's authorized_keys",
            ", ".join(sorted(state.stale_keys)),
            "its line is removed; it expires within minutes in any case",
        )
