"""What is to be done about a job, and what stands in its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from inventory.job import check_job, load_job
from roles.core.role import Finding, Target
from roles.job import busy
from roles.job.declared import resolved
from roles.job.drift import drift, new_launch, new_plan, remarks
from roles.job.probe import Attempt, ErrorRecord, JobState
from roles.job.spec import JobSpec, runs_path
from roles.storage.spec import StorageSpec

from .conftest import PLAN, RUN, fresh, unit, view

Make = Callable[..., Target[JobSpec]]


def found(target: Target[JobSpec], **looks: JobState) -> list[Finding]:
    """The findings on the target's node, with the other looks as peers."""
    own = looks.pop(target.node.name)
    return drift(target, own, looks)


def ids(findings: list[Finding]) -> list[str]:
    return [finding.id for finding in findings]


def test_a_running_job_needs_nothing(target: Make) -> None:
    assert found(target(), node1=view("node1"), node2=view("node2")) == []


def test_an_absent_job_is_started_on_every_node(target: Make) -> None:
    for name in ("node1", "node2"):
        (one,) = found(target(name), node1=fresh("node1"), node2=fresh("node2"))
        assert (one.id, one.repairable) == ("job-absent", True)
        assert one.fix == "attempt 1 starts from the beginning"


def test_an_interrupted_job_is_resumed_from_its_checkpoint(target: Make) -> None:
    state = view("node1", checkpoint="step-00000040", attempts=3)
    (one,) = found(target(), node1=state, node2=view("node2", boot_id="x", units=()))
    assert (one.id, one.fix) == ("job-interrupted", "attempt 4 starts from step-00000040")
    assert one.seen == "interrupted: node2 restarted"


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": {"step": 10}},
        {"attempt": Attempt(PLAN, stopped=True)},
        {"attempt": Attempt(PLAN, errors=(ErrorRecord("own", 0, "h", "ValueError: x", 1.0),))},
    ],
    ids=["complete", "stopped", "failed"],
)
def test_an_ended_job_is_left_alone(target: Make, changes: Mapping[str, Any]) -> None:
    looks = {name: view(name, units=(), **changes) for name in ("node1", "node2")}
    assert found(target(), **looks) == []


def test_a_failed_job_is_started_again_on_request_only(target: Make) -> None:
    attempt = Attempt(PLAN, errors=(ErrorRecord("own", 0, "h", "ValueError: x", 1.0),))
    looks = {name: view(name, units=(), attempt=attempt) for name in ("node1", "node2")}
    assert found(target(), **looks) == []
    assert ids(found(target(options={"retry": True}), **looks)) == ["job-interrupted"]


def test_a_complete_job_is_not_started_again_even_on_request(target: Make) -> None:
    looks = {name: view(name, units=(), complete={"step": 10}) for name in ("node1", "node2")}
    assert found(target(options={"retry": True}), **looks) == []


def test_a_silent_peer_means_that_nothing_is_started(target: Make) -> None:
    (one,) = found(target(), node1=view("node1"))
    assert (one.id, one.repairable) == ("job-unknown", False)
    assert "node2 cannot be read" in one.seen


def test_without_a_job_there_is_nothing_to_find(target: Make) -> None:
    assert found(target(job=None), node1=fresh("node1")) == []


def test_a_node_that_is_not_the_jobs_is_left_alone(target: Make, cluster: Cluster) -> None:
    nodes = {**cluster.nodes, "node3": Node(name="node3", address="10.0.0.3")}
    assert cluster.job is not None
    cluster.job.write_text(cluster.job.read_text() + "nodes: [node2, node1]\n")
    assert found(target("node3", nodes=nodes), node3=fresh("node1")) == []
    assert ids(found(target("node1", nodes=nodes), node1=fresh("node1"), node2=fresh("node2")))


def test_a_changed_job_file_is_named_by_its_keys(target: Make, cluster: Cluster) -> None:
    assert cluster.job is not None
    job = check_job(load_job(cluster.job), cluster)
    declared: dict[str, Any] = {"fingerprint": "of another", "job": resolved(job)}
    other = {**declared["job"], "env": {"OMP_NUM_THREADS": "1"}}
    other["trainer"] = {**other["trainer"], "steps": 11}
    for looks in (
        {name: view(name, declared={**declared, "job": other}) for name in ("node1", "node2")},
        {"node1": view("node1"), "node2": view("node2", declared={**declared, "job": other})},
    ):
        (one,) = found(target(), **looks)
        assert (one.id, one.repairable) == ("job-changed", False)
        assert one.seen == "another env.OMP_NUM_THREADS, trainer.steps"


def test_an_unchanged_job_file_is_no_finding(target: Make, cluster: Cluster) -> None:
    assert cluster.job is not None
    job = check_job(load_job(cluster.job), cluster)
    declared = {"fingerprint": job.fingerprint(), "job": {}}
    looks = {name: view(name, declared=declared) for name in ("node1", "node2")}
    assert found(target(), **looks) == []


@pytest.mark.parametrize(
    ("changes", "finding", "seen"),
    [
        ({"units": (unit(job="dark"),)}, "job-other", "job dark runs"),
        ({"interfaces": {"10.9.9.9": "eth0"}}, "job-interface", "none"),
        ({"listening": frozenset(range(29500, 29600))}, "port-in-use", "all are taken"),
    ],
)
def test_what_makes_a_launch_impossible_is_for_the_user(
    target: Make, changes: Mapping[str, Any], finding: str, seen: str
) -> None:
    findings = found(target(), node1=replace(fresh("node1"), **changes), node2=fresh("node2"))
    assert [(one.id, one.seen, one.repairable) for one in findings] == [(finding, seen, False)]


def test_a_missing_gpu_is_found_before_the_launch(target: Make, cluster: Cluster) -> None:
    nodes = {name: node.model_copy(update={"gpus": 8}) for name, node in cluster.nodes.items()}
    looks = {"node1": fresh("node1", gpus=7), "node2": fresh("node2", gpus=8)}
    assert ids(found(target("node1", nodes=nodes), **looks)) == ["gpu-missing"]
    assert ids(found(target("node2", nodes=nodes), **looks)) == ["job-absent"]


def test_unequal_numbers_of_processes_are_refused(target: Make, cluster: Cluster) -> None:
    assert cluster.job is not None
    cluster.job.write_text(cluster.job.read_text().replace("processes_per_node: 1\n", ""))
    nodes = dict(cluster.nodes)
    nodes["node2"] = nodes["node2"].model_copy(update={"gpus": 4})
    (one,) = found(target(nodes=nodes), node1=fresh("node1"), node2=fresh("node2", gpus=4))
    assert (one.id, one.seen) == ("job-processes", "node1 1, node2 4")


def test_ended_units_of_other_jobs_do_not_matter(target: Make) -> None:
    state = replace(fresh("node1"), units=(unit("failed", job="dark"),))
    assert ids(found(target(), node1=state, node2=fresh("node2"))) == ["job-absent"]


def test_a_job_needs_a_shared_place(target: Make, cluster: Cluster) -> None:
    sections = {key: value for key, value in cluster.sections.items() if key != "storage"}
    assert ids(found(target(sections=sections), node1=fresh("node1"))) == ["job-no-place"]
    bare = replace(cluster, sections=sections)
    assert [key for key, _ in JobSpec().problems(bare)] == ["path"]
    assert list(JobSpec(path="/big/runs").problems(bare)) == []
    assert runs_path(JobSpec(path="/big/runs"), cluster) == "/big/runs"
    assert runs_path(JobSpec(), cluster) == "/shared/runs"


def test_a_job_of_several_nodes_has_no_place_on_their_own_disks(
    target: Make, cluster: Cluster
) -> None:
    local = StorageSpec(kind="local", path="/data")
    sections = {**cluster.sections, "storage": local}
    assert ids(found(target(sections=sections), node1=fresh("node1"))) == ["job-no-place"]
    bare = replace(cluster, sections=sections)
    ((key, sentence),) = JobSpec().problems(bare)
    assert key == "path" and "/data is each node's own (storage.kind: local)" in sentence
    assert "runs.path" in sentence
    own = {**sections, "runs": JobSpec(path="/data/runs")}
    made = replace(target(sections=own), spec=JobSpec(path="/data/runs"))
    assert ids(found(made, node1=fresh("node1"))) == ["job-no-place"]
    elsewhere = replace(made, spec=JobSpec(path="/nfs/runs"))
    assert "job-no-place" not in ids(found(elsewhere, node1=fresh("node1")))
    alone = replace(bare, nodes={"node1": bare.nodes["node1"]})
    assert runs_path(JobSpec(), alone) == "/data/runs"


def test_runs_lie_in_nothing_that_is_kept_the_same(cluster: Cluster) -> None:
    values = {"kind": "local", "path": "/data", "sync": {"x": {"from": "/x"}}}
    sections = {**cluster.sections, "storage": StorageSpec.model_validate(values)}
    told = list(JobSpec(path="/data/x/runs").problems(replace(cluster, sections=sections)))
    assert [key for key, _ in told] == ["path"] and "overlaps /data/x" in told[0][1]


def test_the_plan_takes_boot_ids_and_a_free_port_from_the_looks(target: Make) -> None:
    state = replace(fresh("node1"), listening=frozenset({29500, 29501}), now=77)
    plan = new_plan(target(), state, {"node2": fresh("node2")})
    assert (plan.attempt, plan.nodes, plan.started) == (1, ("node1", "node2"), 77)
    assert plan.boot_ids == {"node1": "boot-a", "node2": "boot-b"}
    assert (plan.master_address, plan.master_port) == ("10.0.0.1", 29502)
    assert (plan.world_size, plan.processes) == (2, 1)


def test_each_node_launches_with_its_own_interface(target: Make) -> None:
    looks = {"node1": fresh("node1"), "node2": fresh("node2")}
    plan = new_plan(target(), looks["node1"], looks)
    names = [
        new_launch(target(name), looks[name], plan).environment["GLOO_SOCKET_IFNAME"]
        for name in looks
    ]
    assert names == ["eth0", "ens3"]


def test_a_node_without_adapter_turns_infiniband_off_for_all_nodes_of_the_job(target: Make) -> None:
    looks = {"node1": fresh("node1", adapters=("mlx5_0",)), "node2": fresh("node2")}
    plan = new_plan(target(), looks["node1"], looks)
    for name, state in looks.items():
        environment = new_launch(target(name), state, plan).environment
        assert environment["NCCL_IB_DISABLE"] == "1"
    looks["node2"] = fresh("node2", adapters=("mlx5_0",))
    plan = new_plan(target(), looks["node1"], looks)
    assert "NCCL_IB_DISABLE" not in new_launch(target(), looks["node1"], plan).environment


def test_the_job_files_own_variables_reach_the_launch(target: Make) -> None:
    plan = new_plan(target(), fresh("node1"), {"node2": fresh("node2")})
    launch = new_launch(target(), fresh("node1"), plan)
    assert launch.environment["OMP_NUM_THREADS"] == "3"
    assert launch.run == RUN


def said(target: Target[JobSpec], looks: Mapping[str, JobState], dry: bool = False) -> list[str]:
    peers = dict(looks)
    own = peers.pop(target.node.name)
    return [line for line, _ in remarks(target, own, peers, dry)]


def test_a_dry_run_shows_the_launch_of_every_node(target: Make) -> None:
    looks = {"node1": fresh("node1"), "node2": fresh("node2")}
    for rank, name in enumerate(looks):
        lines = said(target(name), looks, dry=True)
        assert f"--node-rank {rank} " in lines[-1]
        assert "MASTER_ADDR=10.0.0.1" in lines
    assert said(target(), looks) == [], "a real run starts it instead"


def test_a_dry_run_without_a_peer_says_what_it_cannot_show(target: Make) -> None:
    assert said(target(), {"node1": fresh("node1")}, dry=True) == [
        "the launch cannot be shown, because node2 cannot be read"
    ]


def test_why_a_job_failed_is_said_once_and_how_to_go_on(target: Make) -> None:
    attempt = Attempt(PLAN, errors=(ErrorRecord("own", 1, "h", "ValueError: x", 1.0),))
    looks = {
        "node1": view("node1", attempt=attempt),
        "node2": view("node2", units=(), attempt=attempt),
    }
    lines = said(target("node1"), looks)
    assert lines == [
        "job light failed: node2, rank 1: ValueError: x; logs in /shared/runs/light/attempts/2; "
        "--data retry=true starts it again",
        "a part of it still runs on node1: lockstep stop light",
    ]
    assert said(target("node2"), looks) == []


def test_any_running_job_keeps_a_node_busy() -> None:
    assert busy(view("node1")) == "job light"
    assert busy(fresh("node1")) is None
    assert busy(view("node1", units=(unit("failed"), unit(job="dark")))) == "job dark"
