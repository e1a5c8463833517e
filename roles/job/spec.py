"""What a user may ask of jobs: where their run directories lie. The job itself is a file of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from inventory.base import AbsolutePath, Spec
from inventory.cluster import Cluster
from roles.storage.spec import shared_path, storage_path, synced_at


class JobSpec(Spec):
    """Runs of jobs.

    path: directory on storage that all nodes share; each job has a directory of its name in it.
    None means ``runs`` in the declared shared storage.
    """

    path: AbsolutePath | None = None

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A job needs a place that all its nodes see."""
        if cluster.job is not None and runs_path(self, cluster) is None:
            yield "path", no_place(cluster)
        if self.path is not None and (synced := synced_at(cluster, self.path)):
            yield (
                "path",
                f"{self.path} overlaps {synced}, which storage.sync keeps the same: give another directory",
            )


def no_place(cluster: Cluster) -> str:
    """What a job lacks, in words."""
    own = storage_path(cluster)
    if own is not None:
        return (
            f"a job of several nodes needs a directory that they share, and {own} is each node's own "
            "(storage.kind: local): declare one as runs.path, or for jobs of one node any other"
        )
    return "a job needs storage that all nodes share: declare storage.path, or runs.path here"


def is_own(path: str, cluster: Cluster) -> bool:
    """Whether each node has that directory for itself."""
    own = storage_path(cluster)
    return (
        own is not None and shared_path(cluster) is None and PurePosixPath(path).is_relative_to(own)
    )


def runs_path(spec: JobSpec, cluster: Cluster) -> str | None:
    """The directory of all runs; None where no shared storage is declared."""
    if spec.path is not None:
        return spec.path
    shared = shared_path(cluster)
    return None if shared is None else f"{shared.rstrip('/')}/runs"
