"""A role that changes its nodes together: what holds it back, and how its nodes wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gevent
import pytest
from pyinfra.api.exceptions import DeployError

from inventory.base import Spec
from inventory.cluster import Cluster
from roles.converge import Run, absence, asked
from roles.core import session
from roles.core.role import Finding, Role, Unreadable
from roles.core.steps import Meet

WRONG = Finding("limit-nofile", "4096", "1024", "it is raised")
DISTURBING = Finding("driver-old", "550", "535", "it is replaced", disturbs=True)
FOR_USER = Finding("gpu-missing", "8 GPUs", "7", "see nvidia-smi", repairable=False)
DUE = Finding("job-absent", "it runs", "absent", "it is started")


@dataclass(eq=False)
class FakeState:
    """What pyinfra's state tells of its hosts."""

    data: dict[str, Any] = field(default_factory=dict)
    hosts: dict[str, FakeHost] = field(default_factory=dict)
    failed_hosts: set[FakeHost] = field(default_factory=set)
    active_hosts: set[FakeHost] = field(default_factory=set)
    limit: set[str] = field(default_factory=set)

    @property
    def inventory(self) -> FakeState:
        return self

    def get_host(self, name: str) -> FakeHost:
        return self.hosts[name]

    def get_override_data(self) -> dict[str, Any]:
        return self.data

    def is_host_in_limit(self, host: FakeHost) -> bool:
        return not self.limit or host.name in self.limit


@dataclass(eq=False)
class FakeHost:
    name: str
    state: FakeState


def _role(name: str, **more: Any) -> Role[Spec, str]:
    return Role(
        name=name,
        spec=Spec,
        default=Spec(),
        probe=lambda target: "true",
        parse=lambda text: text,
        drift=lambda target, state, peers: [],
        converge=lambda target, state, peers, findings: iter(()),
        **more,
    )


LIMITS = _role("limits")
JOB = _role("job", together=lambda cluster: tuple(cluster.nodes), busy=lambda state: None)


class Looks:
    """Findings by role and node, in place of looks; an exception is raised."""

    def __init__(self, found: dict[tuple[str, str], Any]) -> None:
        self.found = found

    def drift(self, role: Role[Any, Any], node: FakeHost) -> list[Finding]:
        answer = self.found.get((role.name, node.name), [])
        if isinstance(answer, Exception):
            raise answer
        return list(answer)


@pytest.fixture
def state() -> FakeState:
    """Two nodes that take part."""
    made = FakeState()
    made.hosts = {name: FakeHost(name, made) for name in ("node1", "node2")}
    made.active_hosts = set(made.hosts.values())
    return made


def run_of(cluster: Cluster, found: dict[tuple[str, str], Any] | None = None) -> Run:
    run = Run(cluster, (LIMITS, JOB))
    run.looks = Looks(found or {})  # type: ignore[assignment]
    return run


def obstacles(cluster: Cluster, state: FakeState, found: dict[tuple[str, str], Any]) -> list[str]:
    return run_of(cluster, found).obstacles(JOB, state)


def test_nothing_holds_a_right_cluster_back(cluster: Cluster, state: FakeState) -> None:
    due = {("job", "node1"): [DUE], ("job", "node2"): [DUE]}
    assert obstacles(cluster, state, due) == []


def test_drift_of_another_role_on_any_node_is_named(cluster: Cluster, state: FakeState) -> None:
    (one,) = obstacles(cluster, state, {("limits", "node2"): [WRONG]})
    assert one.startswith("node2 is not right in limits: limit-nofile: want 4096, seen 1024")
    assert "deploy/cluster.py" in one


def test_a_node_outside_the_limit_is_named(cluster: Cluster, state: FakeState) -> None:
    state.limit = {"node2"}
    assert obstacles(cluster, state, {}) == ["node1 is left out by --limit"]


def test_a_node_that_failed_or_was_never_reached_is_named(
    cluster: Cluster, state: FakeState
) -> None:
    node1, node2 = state.hosts.values()
    state.failed_hosts = {node1}
    state.active_hosts = set()
    assert obstacles(cluster, state, {}) == [
        "node1 cannot be reached, or failed",
        "node2 cannot be reached",
    ]


@pytest.mark.parametrize("error", [Unreadable("no answer"), session.NodeFailed("no answer")])
def test_a_role_that_could_not_be_read_is_named(
    cluster: Cluster, state: FakeState, error: Exception
) -> None:
    assert obstacles(cluster, state, {("limits", "node1"): error}) == [
        "node1 could not be read (limits): no answer"
    ]


def test_what_the_role_itself_cannot_repair_on_one_node_holds_all_back(
    cluster: Cluster, state: FakeState
) -> None:
    (one,) = obstacles(cluster, state, {("job", "node1"): [DUE], ("job", "node2"): [FOR_USER]})
    assert one.startswith("node2 is not right in job: gpu-missing")


def test_a_blocked_role_is_told_in_its_own_words(
    cluster: Cluster, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "say", lambda *arguments: None)
    run = run_of(cluster)
    run.block(state.hosts["node1"], "limits", "left alone, because it is Tuesday")
    found = run.obstacles(JOB, state)
    assert found == ["node1 is not right in limits: left alone, because it is Tuesday"]


def test_repairs_that_wait_for_a_running_job_do_not_hold_it_back(
    cluster: Cluster, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {("limits", "node1"): [DISTURBING]}
    monkeypatch.setattr(Run, "busy", lambda self, node: None)
    assert len(obstacles(cluster, state, found)) == 1
    monkeypatch.setattr(Run, "busy", lambda self, node: "job light")
    assert obstacles(cluster, state, found) == []


def test_a_repair_of_what_it_uses_elsewhere_does_not_hold_it_back_either(
    cluster: Cluster, state: FakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: Run, node: FakeHost) -> str | None:
        return "job light" if node.name == "node2" else None

    monkeypatch.setattr(Run, "busy", busy)
    found = {("limits", "node1"): [replace(DISTURBING, shared=True)]}
    assert obstacles(cluster, state, found) == []
    assert len(obstacles(cluster, state, {("limits", "node1"): [DISTURBING]})) == 1


POINT = Meet("the plan", seconds=5)


def meet(run: Run, host: FakeHost, seconds: int = 5) -> str | None:
    return run.meet(JOB, host, replace(POINT, seconds=seconds))


def test_nodes_wait_for_the_last_one(cluster: Cluster, state: FakeState) -> None:
    run, order = run_of(cluster), []

    def node(name: str, after: float) -> Iterator[None]:
        gevent.sleep(after)
        order.append(f"{name} arrives")
        assert meet(run, state.hosts[name]) is None
        order.append(f"{name} goes on")
        return iter(())

    gevent.joinall(
        [gevent.spawn(node, "node1", 0), gevent.spawn(node, "node2", 0.1)], raise_error=True
    )
    assert order[:2] == ["node1 arrives", "node2 arrives"]
    assert sorted(order[2:]) == ["node1 goes on", "node2 goes on"]


def test_nobody_waits_for_a_node_that_is_done(cluster: Cluster, state: FakeState) -> None:
    run = run_of(cluster)
    run.done(JOB, state.hosts["node2"])
    assert meet(run, state.hosts["node1"], seconds=3600) == "node2 did not reach the plan"


def test_nobody_waits_for_a_node_that_failed(cluster: Cluster, state: FakeState) -> None:
    state.failed_hosts = {state.hosts["node2"]}
    assert (
        meet(run_of(cluster), state.hosts["node1"], seconds=3600) == "node2 did not reach the plan"
    )


def test_a_node_that_came_and_ended_since_counts_as_there(
    cluster: Cluster, state: FakeState
) -> None:
    run = run_of(cluster)
    assert meet(run, state.hosts["node2"], seconds=0) == "node1 did not reach the plan"
    run.done(JOB, state.hosts["node2"])
    assert meet(run, state.hosts["node1"]) is None


def test_the_wait_is_bounded(cluster: Cluster, state: FakeState) -> None:
    assert meet(run_of(cluster), state.hosts["node1"], seconds=0) == "node2 did not reach the plan"


def test_absence_is_told_apart(state: FakeState) -> None:
    node = state.hosts["node1"]
    assert absence(node) is None
    state.limit = {"node2"}
    assert absence(node) == "is left out by --limit"


def test_a_job_of_the_command_line_replaces_the_cluster_files(
    cluster: Cluster, state: FakeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.job is not None
    other = tmp_path / "other.yaml"
    other.write_text(cluster.job.read_text().replace("name: light", "name: other"))
    monkeypatch.chdir(tmp_path)
    state.data = {"job": "other.yaml", "retry": True}
    found = asked(cluster, state)
    assert found.job == other
    assert found.options["retry"] is True
    assert cluster.options == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "no such job file"), ("nmae: x\ntrainer: {}\n", "did you mean 'name'?")],
)
def test_a_missing_or_wrong_job_of_the_command_line_is_a_sentence(
    cluster: Cluster, state: FakeState, tmp_path: Path, text: str | None, sentence: str
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    state.data = {"job": str(path)}
    with pytest.raises(DeployError, match="mine.yaml") as caught:
        asked(cluster, state)
    assert sentence in str(caught.value)
