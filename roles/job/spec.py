"""What a user may ask of jobs: where their run directories lie. The job itself is a file of its own."""

from __future__ import annotations

from collections.abc import Iterable

from inventory.base import AbsolutePath, Spec
from inventory.cluster import Cluster
from roles.storage.spec import shared_path


class JobSpec(Spec):
    """Runs of jobs.

    path: directory on storage that all nodes share; each job has a directory of its name in it.
    None means ``runs`` in the declared shared storage.
    """

    path: AbsolutePath | None = None

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A job needs a place that all its nodes see."""
        if cluster.job is not None and runs_path(self, cluster) is None:
            yield "path", NO_PLACE


NO_PLACE = "a job needs storage that all nodes share: declare storage.path, or runs.path here"


def runs_path(spec: JobSpec, cluster: Cluster) -> str | None:
    """The directory of all runs; None where no shared storage is declared."""
    if spec.path is not None:
        return spec.path
    shared = shared_path(cluster)
    return None if shared is None else f"{shared.rstrip('/')}/runs"
