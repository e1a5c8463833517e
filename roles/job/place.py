"""The place of runs that ``runs.path`` declares apart from the storage: judged and marked as the storage is. Pure.

Without that, a job whose place is not mounted after a power cut would look like one that was never started.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Step, quote
from roles.job.declared import members
from roles.job.spec import JobSpec
from roles.storage.drift import not_made_yet, one_directory
from roles.storage.marks import marking
from roles.storage.probe import StorageState
from roles.storage.probe import probe as probe_storage
from roles.storage.spec import StorageSpec, managed


def apart(target: Target[JobSpec]) -> Target[StorageSpec] | None:
    """The place as a directory that the job's nodes share, of which the first is the head.

    None where the storage role judges it, and on a node that is none of the job's.
    """
    path, names = target.spec.path, members(target.cluster)
    if path is None or target.node.name not in names:
        return None
    storage = managed(target.cluster)
    if storage is not None and PurePosixPath(path).is_relative_to(storage.path):
        return None
    cluster = replace(target.cluster, nodes={name: target.cluster.nodes[name] for name in names})
    spec = StorageSpec(kind="existing", path=path, manage=target.spec.manage)
    return Target(cluster, target.node, spec)


def show(target: Target[JobSpec], run: str) -> str:
    """Shell: the storage's probe, each line after ``place``; then, where the place can be entered, ``run``."""
    there = apart(target)
    if there is None:
        return run
    return (
        f"place=$(sh -c {quote(probe_storage(there))}) || exit 3\n"
        "printf '%s\\n' \"$place\" | sed 's/^/place /'\n"
        f'case $place in *"access yes"*)\n{run}\n;; esac'
    )


def drift(target: Target[JobSpec], place: StorageState | None, peers: Peers) -> list[Finding]:
    """Findings: what keeps the job's nodes from having one directory there; on a job's only node, its own.

    Tokens of nodes that this job does not have may be another job's, and stay.
    """
    there = apart(target)
    if there is None or place is None:
        return []
    if place.access == "absent" and place.token is None and not there.others:
        return [not_made_yet(there.spec.path)]
    others = {
        node.name: seen
        for node in there.others
        if node.name in peers and (seen := peers[node.name].place) is not None
    }
    found = one_directory(there, place, others)
    return [each for each in found if each.id != "storage-token-left"]


def converge(
    target: Target[JobSpec], place: StorageState | None, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Mark and tokens of the place."""
    there = apart(target)
    if there is not None and place is not None:
        yield from marking(there, place, findings)
