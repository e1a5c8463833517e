"""Copies an archive to the shared storage, or to the nodes from one to the next; what lies there is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.archives.depot import forget
from roles.archives.drift import missing, unnoted, unused
from roles.archives.probe import ArchivesState, taker
from roles.archives.taking import take
from roles.core import relay
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step
from roles.environment.parcel import deliver, note
from roles.environment.spec import Environments

FORGET_SECONDS = 300
"""Time limit for the removal of large files from a slow file server."""


def converge(
    target: Target[Environments], state: ArchivesState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """One upload an archive: by the head to the shared storage, or by each node to itself. The head alone
    takes what lies on the shared storage."""
    if state.stale_keys:
        yield Shell(relay.sweep(target.node.ssh.user, taker(target)))
    for each in list(missing(target, state, peers)):
        if not each.finding.repairable:
            continue
        if each.parcel:
            if each.parcel.shared(target.cluster):
                yield Shell(note(target.cluster, each.parcel))
            yield from deliver(each.parcel, target, state.parcels, peers)
        elif each.place and target.is_head:
            yield from take(target, each.one, each.place, state.sources[each.one.name])
    for parcel in unnoted(target, state):
        yield Shell(note(target.cluster, parcel))
    if left := unused(target, state):
        yield Shell(forget(target.cluster, left), FORGET_SECONDS)
