"""The job's state from many pieces of evidence, and from those that contradict each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from roles.job.decide import decide, merged
from roles.job.plan import Plan
from roles.job.probe import Attempt, ErrorRecord, Exit, JobState

from .conftest import PLAN, fresh, unit, view

OWN = ErrorRecord("own", 1, "worker", "OutOfMemoryError: CUDA out of memory", 1500.0)
PEER = ErrorRecord("peer", 0, "head", "RuntimeError: Connection closed by peer", 1501.0)
PEER_OF_NODE2 = ErrorRecord("peer", 1, "worker", "RuntimeError: timed out", 1502.0)
TOLD = ErrorRecord("stopped", 0, "head", "stopped by SIGTERM", 1500.0)
KILLED = Exit("exit-code", "exited", "1")
OUT_OF_MEMORY = Exit("oom-kill", "killed", "KILL", asked=True)
WELL = Exit("success", "exited", "0")
ASKED = Exit("exit-code", "exited", "1", asked=True)


def nodes(
    node1: JobState | None = None, node2: JobState | None = None, **files: Any
) -> dict[str, JobState]:
    """Both looks, with the same files of the attempt."""
    found = {"node1": node1 or view("node1"), "node2": node2 or view("node2")}
    attempt = Attempt(PLAN, **files)
    return {
        name: replace(look, attempt=attempt if look.attempt else None)
        for name, look in found.items()
    }


GONE = {"units": ()}
FAILED_UNIT = {"units": (unit("failed"),)}

TABLE: list[tuple[str, dict[str, JobState], str, str]] = [
    ("nothing ever ran", nodes(fresh("node1"), fresh("node2")), "absent", "never started"),
    ("an attempt without a plan", nodes(fresh("node1", ), replace(fresh("node2"), attempts=1)), "absent", "never"),
    ("units active as planned", nodes(), "running", "active"),
    ("a unit that is starting", nodes(view("node1", units=(unit("activating"),))), "running", "active"),
    ("marker", nodes(view("node1", complete={"step": 10}, **GONE), view("node2", **GONE)), "complete", "trainer"),
    ("marker seen by one node only", nodes(node2=view("node2", complete={"step": 10})), "complete", "trainer"),
    ("marker beats a failed shutdown", nodes(view("node1", complete={"step": 10}, **FAILED_UNIT), exits={"node1": KILLED}), "complete", "trainer"),
    ("marker beats a restart", nodes(view("node1", complete={"step": 10}, boot_id="boot-x")), "complete", "trainer"),
    ("stop", nodes(view("node1", **GONE), view("node2", **GONE), stopped=True, exits={"node1": ASKED, "node2": ASKED}), "stopped", "lockstep stop"),
    ("stop beats the error of the end", nodes(stopped=True, errors=(OWN,)), "stopped", "lockstep stop"),
    ("stop beats a restart", nodes(view("node1", boot_id="boot-x"), stopped=True), "stopped", "lockstep stop"),
    ("an own error", nodes(errors=(OWN,)), "failed", "node2, rank 1: OutOfMemoryError"),
    ("an own error beats a peer's earlier record", nodes(errors=(replace(PEER, time=1.0), OWN)), "failed", "OutOfMemoryError"),
    ("an own error, one unit still active", nodes(node2=view("node2", **FAILED_UNIT), errors=(OWN,), exits={"node2": KILLED}), "failed", "rank 1"),
    ("an own error, and a restart later", nodes(view("node1", boot_id="boot-x", **GONE), errors=(OWN,)), "failed", "rank 1"),
    ("an own error, the other node silent", {"node2": nodes(errors=(OWN,))["node2"]}, "failed", "rank 1"),
    ("power cut of one node", nodes(node2=view("node2", boot_id="boot-x", **GONE)), "interrupted", "node2 restarted"),
    ("power cut of both", nodes(view("node1", boot_id="x", **GONE), view("node2", boot_id="y", **GONE)), "interrupted", "node1 and node2 restarted"),
    ("power cut, the survivor lost its peer", nodes(view("node1", **FAILED_UNIT), view("node2", boot_id="x", **GONE), errors=(PEER,), exits={"node1": KILLED}), "interrupted", "node2 restarted"),
    ("power cut, the survivor died without a word", nodes(view("node1", **FAILED_UNIT), view("node2", boot_id="x", **GONE), exits={"node1": KILLED}), "interrupted", "node2 restarted"),
    ("clean reboot", nodes(view("node1", **FAILED_UNIT), view("node2", boot_id="x", **GONE), errors=(TOLD,), exits={"node1": KILLED, "node2": ASKED}), "interrupted", "node2 restarted"),
    ("restarted and active by hand", nodes(node2=view("node2", boot_id="boot-x")), "interrupted", "node2 restarted"),
    ("restarted, the other silent", {"node2": view("node2", boot_id="boot-x", **GONE)}, "interrupted", "node2 restarted"),
    ("link cut: both lost their peer", nodes(view("node1", **FAILED_UNIT), view("node2", **FAILED_UNIT), errors=(PEER, PEER_OF_NODE2), exits={"node1": KILLED, "node2": KILLED}), "interrupted", "Connection closed by peer"),
    ("a rank killed for memory", nodes(view("node1", **FAILED_UNIT), view("node2", **FAILED_UNIT), errors=(PEER,), exits={"node1": KILLED, "node2": KILLED}), "failed", "on node2 it ended with status 1"),
    ("the kernel's out-of-memory killer", nodes(node2=view("node2", **FAILED_UNIT), exits={"node2": OUT_OF_MEMORY}), "failed", "ran out of memory"),
    ("a unit that vanished", nodes(node2=view("node2", **GONE)), "interrupted", "no longer runs on node2"),
    ("all units vanished", nodes(view("node1", **GONE), view("node2", **GONE)), "interrupted", "node1 and node2"),
    ("stopped by hand on one node", nodes(node2=view("node2", **GONE), exits={"node2": ASKED}), "interrupted", "node2"),
    ("stopped by hand, and told so", nodes(view("node1", **FAILED_UNIT), view("node2", **GONE), errors=(TOLD,), exits={"node1": KILLED, "node2": ASKED}), "interrupted", "SIGTERM"),
    ("a unit of an older attempt", nodes(node2=view("node2", units=(unit(attempt=1),))), "interrupted", "node2"),
    ("a unit of another job", nodes(node2=view("node2", units=(unit(job="dark"),))), "interrupted", "node2"),
    ("a unit that is being stopped", nodes(node2=view("node2", units=(unit("deactivating"),))), "interrupted", "node2"),
    ("started on no node", nodes(view("node1", **GONE), view("node2", **GONE)), "interrupted", "node1 and node2"),
    ("somebody is starting it", nodes(view("node1", now=1010, **GONE), view("node2", now=5, **GONE)), "running", "being started"),
    ("a start that broke off", nodes(view("node1", now=1095, **GONE), view("node2", now=5, **GONE)), "interrupted", "node1 and node2"),
    ("a start that failed", nodes(view("node1", now=1010, **GONE), view("node2", **GONE), exits={"node2": KILLED}), "failed", "node2"),
    ("a restart within the first minute", nodes(node2=view("node2", now=1010, boot_id="x", **GONE)), "interrupted", "node2 restarted"),
    ("ended with 0, no marker", nodes(view("node1", **GONE), view("node2", **GONE), exits={"node1": WELL, "node2": WELL}), "failed", "does not say that it is complete"),
    ("one ended with 0, the other runs", nodes(node2=view("node2", **GONE), exits={"node2": WELL}), "interrupted", "node2"),
    ("a peer silent", {"node1": view("node1")}, "unknown", "node2 cannot be read"),
    ("a peer silent, this unit ended", {"node1": view("node1", **GONE)}, "unknown", "node2 cannot be read"),
    ("a peer silent, the survivor lost it", {"node1": nodes(view("node1", **FAILED_UNIT), errors=(PEER,), exits={"node1": KILLED})["node1"]}, "interrupted", "closed by peer; node2 cannot be read"),
    ("a peer silent, the survivor ended", {"node1": nodes(view("node1", **FAILED_UNIT), exits={"node1": KILLED})["node1"]}, "interrupted", "it ended on node1; node2 cannot be read"),
    ("a peer silent, never started", {"node1": fresh("node1")}, "absent", "never started"),
    ("nobody answers", {}, "unknown", "no node"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("views", "state", "reason"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_evidence_decides_the_state(views: dict[str, JobState], state: str, reason: str) -> None:
    decision = decide("light", views)
    assert decision.state == state, decision
    assert reason in decision.reason


def test_survivors_are_the_nodes_that_still_hold_a_part() -> None:
    found = decide(
        "light",
        nodes(view("node1", units=(unit("deactivating"),)), view("node2", boot_id="x", units=())),
    )
    assert found.survivors == ("node1",)


def test_the_last_attempt_counts_although_one_node_does_not_see_it_yet() -> None:
    late = view("node2", attempt=Attempt(replace(PLAN, attempt=1), errors=(OWN,)))
    assert decide("light", {"node1": view("node1"), "node2": late}).state == "running"
    assert decide("light", {"node1": view("node1"), "node2": late}).attempt == 2


def test_files_that_only_one_node_sees_count_for_all() -> None:
    attempt = merged(
        {
            "node1": view("node1", attempt=Attempt(PLAN, exits={"node1": KILLED})),
            "node2": view("node2", attempt=Attempt(PLAN, errors=(PEER,), stopped=True)),
        }
    )
    assert attempt == Attempt(PLAN, {"node1": KILLED}, (PEER,), True)


def test_a_rank_is_named_by_its_node_of_the_cluster_file_not_by_its_host_name() -> None:
    plan = Plan(1, ("node1", "node2"), {"node1": "a", "node2": "b"}, "10.0.0.1", 29500, 8, 4, 0)
    assert [plan.node_of(rank) for rank in (0, 3, 4, 7, 8)] == [
        "node1",
        "node1",
        "node2",
        "node2",
        "?",
    ]
