"""Copies an archive to the shared storage, or to the nodes from one to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.archives.drift import missing
from roles.archives.probe import ArchivesState, taker
from roles.core import relay
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step
from roles.environment.parcel import deliver
from roles.environment.spec import Environments


def converge(
    target: Target[Environments], state: ArchivesState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """One upload an archive: by the head to the shared storage, or by each node to itself."""
    if state.stale_keys:
        yield Shell(relay.sweep(target.node.ssh.user, taker(target)))
    for _, parcel in list(missing(target, state, peers)):
        yield from deliver(parcel, target, state.parcels, peers)
