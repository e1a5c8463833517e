"""A cluster of two CPU nodes with one job, and looks of them; each test changes what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target
from roles.environment.spec import Environments
from roles.job.plan import Plan
from roles.job.probe import Attempt, JobState, Unit
from roles.job.spec import JobSpec
from roles.storage.spec import StorageSpec

JOB = """\
name: light
processes_per_node: 1
env: {OMP_NUM_THREADS: 3}
trainer:
  model: {config: {model_type: llama}}
  data: {files: [/shared/text], tokenizer: {train: {vocab_size: 512}}, sequence_length: 64}
  steps: 10
"""
BOOTS = {"node1": "boot-a", "node2": "boot-b"}
PLAN = Plan(2, ("node1", "node2"), BOOTS, "10.0.0.1", 29500, 2, 1, 1000)
RUN = "/shared/runs/light"


def unit(active: str = "active", attempt: int = 2, job: str = "light") -> Unit:
    """A unit as systemd shows it."""
    return Unit(job, attempt, active, "success")


def view(name: str, **changes: Any) -> JobState:
    """A look of a healthy node that runs its part of attempt 2."""
    base = JobState(
        boot_id=BOOTS[name],
        now=2000,
        cores=8,
        gpus=0,
        interfaces={f"10.0.0.{name[-1]}": "eth0" if name == "node1" else "ens3"},
        listening=frozenset({22}),
        units=(unit(),),
        attempts=2,
        attempt=Attempt(PLAN),
    )
    return replace(base, **changes)


def fresh(name: str, **changes: Any) -> JobState:
    """A look of a node on which the job never ran."""
    return view(name, units=(), attempts=0, attempt=None, **changes)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """node1 and node2, with shared storage, one environment and the job file above."""
    job = tmp_path / "light.yaml"
    job.write_text(JOB)
    nodes = {name: Node(name=name, address=f"10.0.0.{name[-1]}") for name in BOOTS}
    archive = tmp_path / "environment.tar"
    sections = {
        "storage": StorageSpec(kind="existing", path="/shared"),
        "environments": Environments.model_validate({"main": {"archive": str(archive)}}),
    }
    return Cluster("test", tmp_path / "cluster.yaml", nodes, sections=sections, job=job)


@pytest.fixture
def target(cluster: Cluster) -> Callable[..., Target[JobSpec]]:
    """The job role's target on a node; further arguments change the cluster."""

    def make(name: str = "node1", **changes: Any) -> Target[JobSpec]:
        changed = replace(cluster, **changes)
        return Target(changed, changed.nodes[name], JobSpec())

    return make


Views = Mapping[str, JobState]
