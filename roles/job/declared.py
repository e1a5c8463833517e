"""Which job this run is about, and where its run directory lies on the nodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from inventory.cluster import Cluster
from inventory.job import Job, check_job, load_job
from roles.core.role import Target
from roles.environment.spec import Environments
from roles.job.spec import JobSpec, runs_path


@cache
def _read_once(path: Path) -> Job:
    """A job file; read once a run, so that all nodes get the same one. Raises InventoryProblem."""
    return load_job(path)


def job_of(cluster: Cluster) -> Job | None:
    """The job that the cluster file, or ``--data job=PATH``, names. Raises InventoryProblem."""
    return None if cluster.job is None else check_job(_read_once(cluster.job), cluster)


def members(cluster: Cluster) -> tuple[str, ...]:
    """The names of the job's nodes, in the order of ranks; empty without a job."""
    job = job_of(cluster)
    return () if job is None else tuple(job.nodes or ())


def run_directory(target: Target[JobSpec]) -> str | None:
    """The job's run directory; None on a node that is not the job's, or without a place for it."""
    job, runs = job_of(target.cluster), runs_path(target.spec, target.cluster)
    if job is None or runs is None or target.node.name not in (job.nodes or ()):
        return None
    return f"{runs}/{job.name}"


def environment_prefix(cluster: Cluster, job: Job) -> str:
    """Where the job's environment lies on the nodes. Raises StopIteration if it is not declared."""
    section = cluster.section("environments", Environments)
    declared = section.each() if section else []
    return next(one.prefix for one in declared if one.name == job.environment)


def resolved(job: Job) -> dict[str, Any]:
    """What decides the training, as JSON: job.json holds it, so that a changed job can be told."""
    return {
        "name": job.name,
        "nodes": list(job.nodes or ()),
        "environment": job.environment,
        "processes_per_node": job.processes_per_node,
        "env": dict(job.env),
        "trainer": job.trainer.model_dump(mode="json", exclude={"output"}),
    }
