"""The steps of a launch, and what its shell does on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic

import pytest
import yaml

from inventory.cluster import Cluster
from inventory.job import check_job, load_job
from roles.core.role import Finding, Target
from roles.core.steps import Meet, Shell, Step
from roles.job.converge import await_start, converge, publish, start, watch
from roles.job.drift import drift, new_launch, new_plan
from roles.job.plan import Here, Launch, compose
from roles.job.probe import Attempt, JobState
from roles.job.spec import JobSpec
from trainer.files import write_json
from trainer.reader import load

from .conftest import PLAN, fresh, view

module = sys.modules["roles.job.converge"]  # the package gives that name to the function
Make = Callable[..., Target[JobSpec]]


ABSENT = Finding("job-absent", "it runs", "absent", "it is started")


def steps(target: Target[JobSpec], own: JobState, **peers: JobState) -> list[Step]:
    return list(converge(target, own, peers, drift(target, own, peers)))


def points(found: list[Step]) -> list[str]:
    return [step.point for step in found if isinstance(step, Meet)]


def test_the_first_node_plans_and_starts(target: Make) -> None:
    found = steps(target(), fresh("node1"), node2=fresh("node2"))
    assert [type(step) for step in found] == [Meet, Shell, Meet, Shell, Meet, Shell]
    last = found[-1]
    assert isinstance(last, Shell) and last.show and last.seconds > 600


def test_the_others_read_the_first_nodes_plan(target: Make) -> None:
    plan = new_plan(target(), fresh("node1"), {"node2": fresh("node2")})
    planned = view("node1", units=(), attempts=1, attempt=Attempt(plan))
    found = list(converge(target("node2"), fresh("node2"), {"node1": planned}, [ABSENT]))
    assert [type(step) for step in found] == [Meet, Meet, Shell, Meet, Shell]
    launch = new_launch(target("node2"), fresh("node2"), plan)
    assert isinstance(found[2], Shell)
    assert found[2] == Shell(start(launch), seconds=found[2].seconds)


def test_all_nodes_meet_at_the_same_points(target: Make) -> None:
    first = steps(target(), fresh("node1"), node2=fresh("node2"))
    plan = new_plan(target(), fresh("node1"), {"node2": fresh("node2")})
    planned = view("node1", units=(), attempts=1, attempt=Attempt(plan))
    second = list(converge(target("node2"), fresh("node2"), {"node1": planned}, [ABSENT]))
    assert points(first) == points(second)


@pytest.mark.parametrize(
    "shown",
    [
        fresh("node1"),
        view("node1"),
        view("node1", attempt=Attempt(replace(PLAN, attempt=3, boot_ids={"node1": "a", "node2": "x"}))),
    ],
    ids=["no plan", "only the old plan", "a plan for another boot of this node"],
)  # fmt: skip
def test_without_a_new_plan_for_it_a_node_starts_nothing(target: Make, shown: JobState) -> None:
    found = list(converge(target("node2"), view("node2"), {"node1": shown}, [ABSENT]))
    last = found[-1]
    assert isinstance(last, Shell) and last.command.endswith("exit 1")
    assert not any(isinstance(step, Shell) and "systemctl start" in step.command for step in found)


def test_a_node_that_falls_silent_before_the_plan_stops_the_launch(target: Make) -> None:
    found = list(converge(target(), fresh("node1"), {}, [ABSENT]))
    last = found[-1]
    assert isinstance(last, Shell) and "node2 cannot be read any more" in last.command
    assert last.command.endswith("exit 1")


def test_survivors_are_ended_on_all_nodes_before_anything_new_is_planned(target: Make) -> None:
    survivor = view("node1")
    found = steps(target(), survivor, node2=view("node2", boot_id="x", units=()))
    first = found[0]
    assert isinstance(first, Shell) and "systemctl kill -s KILL" in first.command
    assert isinstance(found[1], Meet)
    assert isinstance(found[2], Shell) and "plan.json" in found[2].command


def test_a_node_whose_start_stays_alone_is_ended_again(target: Make) -> None:
    meeting = steps(target(), fresh("node1"), node2=fresh("node2"))[-2]
    assert isinstance(meeting, Meet) and "systemctl kill -s KILL" in meeting.otherwise


def test_what_somebody_else_is_starting_is_waited_for_and_not_started_twice(target: Make) -> None:
    looks = {name: view(name, now=1010, units=()) for name in ("node1", "node2")}
    for name, other in (("node1", "node2"), ("node2", "node1")):
        findings = drift(target(name), looks[name], {other: looks[other]})
        assert [(found.id, found.repairable) for found in findings] == [("job-starting", True)]
        found = list(converge(target(name), looks[name], {other: looks[other]}, findings))
        assert [type(step) for step in found] == [Shell, Meet]
        waiting = found[0]
        assert isinstance(waiting, Shell) and waiting.seconds > 80
        assert "systemctl start" not in waiting.command and "kill" not in waiting.command


def test_a_start_ends_the_wait_and_so_does_its_time_when_nobody_goes_on_with_it(
    tmp_path: Path, tools: str
) -> None:
    waiting = await_start("lockstep-light.service", str(tmp_path / "attempts" / "2"), 1)
    assert sh(waiting, tools).returncode == 0
    (tmp_path / "active").unlink()
    began = monotonic()
    assert sh(waiting, tools).returncode == 0 and monotonic() - began >= 2
    (tmp_path / "attempts" / "2").mkdir(parents=True)
    (tmp_path / "attempts" / "2" / "node2.exit").touch()
    assert "ended while it was being started" in sh(waiting, tools).stderr


def sh(
    script: str, path: str = "/usr/sbin:/usr/bin:/sbin:/bin"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"set -e\n{script}"],
        capture_output=True,
        text=True,
        env={"PATH": path},
        timeout=30,
        check=False,
    )


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH whose systemctl says that units are active while the file ``active`` exists."""
    directory = tmp_path / "bin"
    directory.mkdir()
    (directory / "systemctl").write_text(
        f"#!/bin/sh\ncase $1 in is-active) test -e {tmp_path}/active;; *) exit 0;; esac\n"
    )
    (directory / "chown").write_text("#!/bin/sh\n")
    for tool in directory.iterdir():
        tool.chmod(0o755)
    (tmp_path / "active").touch()
    return f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin"


def test_what_is_published_is_a_config_that_the_trainer_reads(
    cluster: Cluster, tmp_path: Path, tools: str
) -> None:
    assert cluster.job is not None
    job, run = check_job(load_job(cluster.job), cluster), tmp_path / "runs" / "light"
    done = sh(publish(job, str(run), PLAN), tools)
    assert (done.returncode, done.stderr) == (0, "")
    config = load(run / "trainer.yaml")
    assert config.output == str(run)
    assert config.model_copy(update={"output": None}) == job.trainer
    assert json.loads((run / "job.json").read_text())["fingerprint"] == job.fingerprint()
    assert json.loads((run / "attempts" / "2" / "plan.json").read_text()) == {
        **PLAN.as_json(),
        "nodes": ["node1", "node2"],
    }
    assert yaml.safe_load((run / "trainer.yaml").read_text())["steps"] == 10
    assert (run / "job.json").stat().st_mode & 0o777 == 0o600, "the job's variables may be secret"


def test_of_two_that_begin_the_same_attempt_one_gives_way(
    cluster: Cluster, tmp_path: Path, tools: str
) -> None:
    assert cluster.job is not None
    job, run = check_job(load_job(cluster.job), cluster), str(tmp_path / "light")
    assert sh(publish(job, run, PLAN), tools).returncode == 0
    before = (tmp_path / "light" / "attempts" / "2" / "plan.json").read_text()
    config = (tmp_path / "light" / "trainer.yaml").read_text()
    cluster.job.write_text(cluster.job.read_text().replace("steps: 10", "steps: 99"))
    other = check_job(load_job(cluster.job), cluster)
    second = sh(publish(other, run, replace(PLAN, master_port=29999)), tools)
    assert (tmp_path / "light" / "trainer.yaml").read_text() == config
    assert second.returncode == 1
    assert "begun by somebody else" in second.stderr
    assert (tmp_path / "light" / "attempts" / "2" / "plan.json").read_text() == before
    assert sorted(path.name for path in (tmp_path / "light" / "attempts").iterdir()) == ["2"]


def light(run: Path, node: str = "node1") -> Launch:
    return compose(
        PLAN,
        Here(node, "eth0", 1, 0),
        job="light",
        run=str(run),
        prefix="/env",
        operators={},
        extra={},
    )


def test_a_unit_that_somebody_else_started_is_not_written_over(tmp_path: Path, tools: str) -> None:
    (tmp_path / "attempts" / "2").mkdir(parents=True)
    (tmp_path / "attempts" / "2" / "plan.json").touch()
    done = sh(start(light(tmp_path)), tools)
    assert done.returncode == 1
    assert "active already on node1" in done.stderr


def test_a_plan_that_is_not_seen_here_is_said_to_be_a_matter_of_the_storage(
    tmp_path: Path, tools: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roles.core.steps.APPEAR_SECONDS", 1)
    done = sh(start(light(tmp_path / "empty")), tools)
    assert done.returncode == 1
    assert "do all nodes share that storage?" in done.stderr


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of attempt 2, and no pause before the first cause is read."""
    monkeypatch.setattr(module, "OWN_BEATS_PEER_SECONDS", 0)
    directory = tmp_path / "light" / "attempts" / "2"
    directory.mkdir(parents=True)
    return directory


def watched(attempt: Path, tools: str, limit: int = 20) -> subprocess.CompletedProcess[str]:
    run = attempt.parent.parent
    return sh(watch(light(run), PLAN, limit), tools)


def test_the_first_step_of_this_attempt_ends_the_watch(attempt: Path, tools: str) -> None:
    metrics = attempt.parent.parent / "metrics.jsonl"
    metrics.write_text('{"step": 1, "attempt": 1, "x": 0}\n{"step": 2, "attempt": 2, "x": 0}\n')
    done = watched(attempt, tools)
    assert done.returncode == 0
    assert done.stdout.startswith("the first step was made after ")


def test_steps_of_an_older_or_higher_attempt_do_not(attempt: Path, tools: str) -> None:
    metrics = attempt.parent.parent / "metrics.jsonl"
    metrics.write_text('{"step": 1, "attempt": 1}\n{"step": 2, "attempt": 22}\n')
    done = watched(attempt, tools, limit=1)
    assert done.returncode == 1
    assert "no first step within 1 s; the job goes on" in done.stderr
    assert "waiting for the first step: 0 s" in done.stdout


def test_a_job_that_completes_at_once_is_fine(attempt: Path, tools: str) -> None:
    write_json(attempt.parent.parent / "complete.json", {"step": 2})
    assert watched(attempt, tools).returncode == 0


def test_the_own_error_beats_the_peers_earlier_one(attempt: Path, tools: str) -> None:
    record = {"host": "h", "traceback": "x"}
    peer = {**record, "kind": "peer", "rank": 0, "error": "Connection closed by peer", "time": 1.5}
    own = {**record, "kind": "own", "rank": 1, "error": 'no file "中.txt"', "time": 2.5}
    write_json(attempt / "rank-00000.error.json", peer)
    write_json(attempt / "rank-00001.error.json", own)
    done = watched(attempt, tools)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f'node2, rank 1: no file "中.txt"; logs in {attempt}'


def test_the_earliest_of_several_own_errors_is_told(attempt: Path, tools: str) -> None:
    for rank, time in ((0, 1795222731.25), (1, 1795222730.5)):
        content = {"kind": "own", "host": "h", "rank": rank, "error": f"error of {rank}"}
        write_json(attempt / f"rank-0000{rank}.error.json", {**content, "time": time})
    assert "node2, rank 1: error of 1;" in watched(attempt, tools).stderr


def test_a_unit_that_ends_without_a_record_is_told_by_its_log(attempt: Path, tools: str) -> None:
    (attempt / "node2.exit").write_text("exit-code exited 1\n")
    (attempt / "node2.log").write_text("first\nNo module named trainer\n")
    done = watched(attempt, tools)
    assert done.returncode == 1
    assert "node2 ended without a record of a rank" in done.stderr
    assert "No module named trainer" in done.stderr


def test_a_dead_unit_ends_the_watch(attempt: Path, tools: str, tmp_path: Path) -> None:
    (tmp_path / "active").unlink()
    done = watched(attempt, tools)
    assert done.returncode == 1
    assert "the unit ended on this node" in done.stderr


def test_an_attempt_that_was_overtaken_is_not_waited_for(attempt: Path, tools: str) -> None:
    (attempt.parent / "3").mkdir()
    done = watched(attempt, tools)
    assert done.returncode == 1
    assert "somebody else has begun attempt 3" in done.stderr
