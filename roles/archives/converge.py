"""Copies an archive to the shared storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.archives.drift import unpublished
from roles.archives.probe import ArchivesState
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Step
from roles.environment.parcel import deliver
from roles.environment.spec import Environments


def converge(
    target: Target[Environments], state: ArchivesState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """One upload an archive, by the head."""
    for _, _, parcel in list(unpublished(target, state, peers)):
        yield from deliver(parcel, target, state.parcels, peers)
