"""Copies an archive to the shared storage, or to the nodes from one to the next; what lies there is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.archives.depot import forget
from roles.archives.drift import missing, unnoted, unused
from roles.archives.probe import ArchivesState, taker
from roles.archives.taking import take
from roles.core import relay
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, Upload
from roles.environment.converge import UNPACK_SECONDS, alone, prepare
from roles.environment.parcel import Parcel, deliver, note
from roles.environment.room import room_for_archive
from roles.environment.sources import described
from roles.environment.spec import Declared, Environments

FORGET_SECONDS = 300
"""Time limit for the removal of large files from a slow file server."""


def converge(
    target: Target[Environments], state: ArchivesState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """One upload an archive: by the head to the shared storage, or by each node to itself. The head alone
    takes what lies on the shared storage."""
    if state.stale_keys:
        yield Shell(relay.sweep(target.node.ssh.user, taker(target)))
    # As the head saw them: what is read below makes more known than the probe could ask for.
    lacking, left = unnoted(target, state), unused(target, state)
    for each in list(missing(target, state, peers)):
        if not each.finding.repairable:
            continue
        if each.parcel:
            coming = deliver(each.parcel, target, state.parcels, peers)
            yield Shell(_prepare(target, each.one, each.parcel, coming), UNPACK_SECONDS)
            yield from coming
        elif each.place and target.is_head:
            yield from take(target, each.one, each.place, state.sources[each.one.name])
    for parcel in lacking:
        yield Shell(note(target.cluster, parcel))
    if left:
        yield Shell(forget(target.cluster, left), FORGET_SECONDS)


def _prepare(
    target: Target[Environments], one: Declared, parcel: Parcel, coming: Sequence[Upload]
) -> str:
    """Shell that ends, with the reason, where what comes has no room, or a node none to unpack what it gets."""
    if parcel.shared(target.cluster):
        rooms = "".join(room_for_archive(one, each) for each in coming)
        return f"{rooms}{note(target.cluster, parcel)}"
    return alone(prepare(target, one, described(target.cluster, one), coming))
