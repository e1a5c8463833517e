"""What ``lockstep status`` says, and which job its argument means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.jobs_cli import EXIT_CODES, Named, Seen, named, report, text
from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from roles.job.decide import decide

from .conftest import RUN, fresh, unit, view

LIGHT = Named("light", RUN)
METRICS = {"step": 40, "loss": 5.25, "tokens_per_s": 6123.4, "eta_s": 90061.0, "attempt": 2}
DECLARED = {"fingerprint": "x", "job": {"trainer": {"steps": 60}}}


def seen(silent: dict[str, str] | None = None, **changes: object) -> Seen:
    states = {name: view(name, **changes) for name in ("node1", "node2")}
    for name in silent or {}:
        del states[name]
    return Seen(states, silent or {})


def told(found: Seen) -> dict[str, object]:
    return report(LIGHT, decide("light", found.states), found)


def test_a_running_job_is_told_with_its_step_and_time_left() -> None:
    found = told(seen(metrics=METRICS, declared=DECLARED, checkpoint="step-00000040"))
    assert text(found).splitlines() == [
        "job         light",
        "state       running (its units are active)",
        "attempt     2",
        "step        40 of 60",
        "loss        5.2500",
        "tokens/s    6,123",
        "time left   1 d 1 h",
        "checkpoint  step-00000040",
        "node 0      node1: active",
        "node 1      node2: active",
        "run         /shared/runs/light",
        "logs        /shared/runs/light/attempts/2",
    ]


def test_a_node_that_restarted_is_marked() -> None:
    found = seen()
    states = {**found.states, "node2": view("node2", boot_id="x", units=())}
    lines = text(told(Seen(states, {}))).splitlines()
    assert "node 1      node2: ended, restarted since" in lines


def test_a_silent_node_is_told_with_its_reason() -> None:
    lines = text(told(seen(silent={"node2": "cannot connect: timed out"}))).splitlines()
    assert lines[1] == "state       unknown (node2 cannot be read)"
    assert "node 1      node2: cannot connect: timed out" in lines


def test_an_ended_job_has_no_time_left() -> None:
    found = told(seen(metrics=METRICS, complete={"step": 60}, units=(unit("failed"),)))
    assert (found["state"], found["eta_s"]) == ("complete", None)
    assert isinstance(found["nodes"], list)
    assert found["nodes"][0]["unit"] == "ended"


def test_a_job_that_never_started_is_told_in_three_lines() -> None:
    states = {name: fresh(name) for name in ("node1", "node2")}
    assert len(text(told(Seen(states, {}))).splitlines()) == 3


def test_a_loss_that_is_no_number_is_left_out() -> None:
    found = told(seen(metrics={**METRICS, "loss": None}))
    assert "loss" not in text(found)


def test_only_a_healthy_job_exits_with_0() -> None:
    assert EXIT_CODES == {"running": 0, "complete": 0, "unknown": 2}


def test_without_an_argument_the_cluster_files_job_is_meant(cluster: Cluster) -> None:
    assert named(None, cluster) == Named("light", "/shared/runs/light")


def test_a_job_is_named_by_its_file_or_by_its_name(cluster: Cluster, tmp_path: Path) -> None:
    assert named(str(cluster.job), cluster) == LIGHT
    assert named("older-one", cluster) == Named("older-one", "/shared/runs/older-one")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [(None, "names no job"), ("jobs/x.yaml", "no such job file"), ("x.yaml", "no such job file")],
)
def test_what_names_no_job_is_a_sentence(
    cluster: Cluster, argument: str | None, sentence: str
) -> None:
    with pytest.raises(InventoryProblem, match=sentence):
        named(argument, replace(cluster, job=None))
