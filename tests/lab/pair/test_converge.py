"""From bare nodes to a finished training, and back to it after every kind of break. In this order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from roles.job.decide import STARTING_SECONDS
from tests.lab.cycle import Case, cycle, label, plan, shares
from tests.lab.site import BIN, JOB, NODES, ROOT, Site


@pytest.fixture(autouse=True)
def _the_first_job_again(lab: Site) -> Iterator[None]:
    """Every test begins with the job that the first run completed, so that nothing starts unasked."""
    yield
    lab.write_job()


def test_bare_nodes_are_reported_as_drift_and_nothing_is_changed_by_looking(
    lab: Site,
) -> None:
    before = {
        node: lab.shell(node, "cat /etc/hosts; ls /etc/ssh /etc/security/limits.d")
        for node in NODES
    }
    report = lab.verify()
    found = {(finding["node"], finding["id"]) for finding in report["findings"]}
    assert {("node1", "hostname-loopback"), ("node2", "hostname-unresolvable")} <= found
    after = {
        node: lab.shell(node, "cat /etc/hosts; ls /etc/ssh /etc/security/limits.d")
        for node in NODES
    }
    assert report["verdict"] == "drift" and before == after


def test_a_dry_run_lists_the_work_and_changes_nothing(lab: Site) -> None:
    before = lab.shell("node1", "cat /etc/hosts; dpkg-query -l pdsh 2>&1; ls /opt; true")
    done = lab.pyinfra("deploy/cluster.py", "--dry")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hostname-unresolvable" in done.stderr and "job-absent" in done.stderr
    assert lab.shell("node1", "cat /etc/hosts; dpkg-query -l pdsh 2>&1; ls /opt; true") == before
    assert not lab.runs.exists()


def test_one_run_brings_bare_nodes_to_a_training_that_completes(lab: Site) -> None:
    results = lab.converge()
    assert results["totals"]["success"] > 0
    lab.finished("rehearsal")
    metrics = lab.metrics("rehearsal")
    assert metrics[0]["world_size"] == 2 and sorted(metrics[0]["hosts"]) == ["node1", "node2"]
    assert metrics[-1]["step"] == 40 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert lab.verify()["verdict"] == "ok"


def test_a_second_run_changes_nothing_and_sends_each_node_exactly_one_command(
    lab: Site,
) -> None:
    before = {node: len(lab.sessions(node)) for node in NODES}
    results = lab.converge()
    assert results["totals"]["success"] == 0 and results["totals"]["error"] == 0
    started = {node: len(lab.sessions(node)) - count for node, count in before.items()}
    assert started == {"node1": 1, "node2": 1}


def test_the_nodes_are_identical_and_the_report_says_by_what(lab: Site) -> None:
    identity = {row["fact"]: row for row in lab.verify()["identity"]}
    for fact in ("torch", "deepspeed", "transformers", "Python of the environment"):
        assert identity[fact]["ok"] and set(identity[fact]["values"]) == {"node1", "node2"}, fact


def test_environments_of_two_nodes_are_compared_file_by_file(lab: Site) -> None:
    same = lab.lockstep("env", "diff", "node1", "node2", "--json")
    assert same.returncode == 0 and json.loads(same.stdout)["same"], same.stderr
    left = lab.lockstep("env", "leftovers", "node1", "--environment", "main", "--json")
    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout)["prefix"] == "/opt/lockstep/envs/main"
    file = "lib/python3.11/site-packages/numpy/__init__.py"
    path = f"/opt/lockstep/envs/main/{file}"
    size = lab.shell("node2", f"stat -c %s {path}; echo '# by hand' >>{path}").strip()
    try:
        other = lab.lockstep("env", "diff", "node1", "node2", "--json")
        assert other.returncode == 1, other.stderr
        found = json.loads(other.stdout)
        assert list(found["files"]) == ["numpy"] and list(found["files"]["numpy"]) == [file]
        assert not found["distributions"] and not found["general"]
    finally:
        lab.shell("node2", f"truncate -s {size} {path}")
    assert lab.lockstep("verify", "--deep").returncode == 0


def test_commands_and_imports_work_from_a_plain_ssh_login(lab: Site) -> None:
    declared = yaml.safe_load(lab.cluster.read_text())
    done = lab.run(
        "ssh", "-i", declared["ssh"]["key"], "-o", f"UserKnownHostsFile={declared['ssh']['known_hosts']}",
        "-o", "BatchMode=yes", f"root@{declared['nodes']['node1']['address']}",
        "torchrun --help && ssh node2 torchrun --help && ssh node2 \"python -c 'import torch; print(torch.__file__)'\"",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: torchrun") == 2
    assert done.stdout.splitlines()[-1].startswith("/opt/lockstep/envs/main/lib/")


@pytest.fixture(scope="module")
def brief(lab: Site) -> Site:
    """The lab with a quick proof of the environment: the tests above gave the whole one."""
    lab.prove_briefly()
    return lab


SAMPLED, _, LEFT = shares()


@pytest.mark.parametrize("broken", plan(SAMPLED), ids=label)
def test_what_breaks_is_named_by_verify_and_repaired_by_one_run(
    brief: Site, broken: Sequence[Case]
) -> None:
    cycle(brief, broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", plan(LEFT), ids=label)
def test_what_only_this_pair_can_show_is_named_and_repaired_as_well(
    brief: Site, broken: Sequence[Case]
) -> None:
    cycle(brief, broken)


def test_a_power_cut_during_training_resumes_from_the_checkpoint_with_one_run(
    lab: Site,
) -> None:
    name = "cut"
    job = lab.write_job(name=name, trainer={"steps": 120, "checkpoint": {"every": 10}})
    done = lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}")
    assert done.returncode == 0, done.stderr[-3000:]
    lab.wait(
        "a complete checkpoint",
        lambda: list((lab.runs / name / "checkpoints").glob("step-*/COMPLETE")),
    )
    # Held up, so that it is still in the middle when the power goes.
    lab.shell("node2", "systemctl kill -s STOP 'lockstep-*.service'")
    assert lab.lockstep("lab", "cut", "node2").returncode == 0
    assert not (lab.runs / name / "complete.json").exists()
    refused = lab.pyinfra("deploy/cluster.py", "-y")  # node2 is off
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert lab.lockstep("lab", "start", "node2").returncode == 0
    report = lab.verify()
    assert {finding["id"] for finding in report["findings"]} <= {
        "job-interrupted",
        "shm-nccl",
        "not-synchronised",
    }, report["findings"]
    lab.converge()
    lab.finished(name)
    steps = [record["step"] for record in lab.metrics(name)]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    assert {record["attempt"] for record in lab.metrics(name)} == {1, 2}
    resumed = next(record["step"] for record in lab.metrics(name) if record["attempt"] == 2)
    assert resumed % 10 == 1 and resumed > 1, "it goes on after a checkpoint, not from the start"
    assert lab.verify()["verdict"] == "ok"


@pytest.mark.slow
def test_after_a_power_cut_of_all_nodes_a_job_with_autostart_completes_without_a_command(
    lab: Site,
) -> None:
    name, unit = "unattended", "systemctl is-enabled autostart-lockstep.service || true"
    job = {"name": name, "trainer": {"steps": 600, "checkpoint": {"every": 25}}}
    lab.write_job(**job, autostart=True)
    lab.converge()
    assert lab.shell("node1", unit).strip() == "enabled"
    lab.wait(
        "a complete checkpoint",
        lambda: list((lab.runs / name / "checkpoints").glob("step-*/COMPLETE")),
    )
    for node in NODES:
        assert lab.lockstep("lab", "cut", node).returncode == 0
    assert not (lab.runs / name / "complete.json").exists()
    assert lab.lockstep("lab", "start", "node1").returncode == 0
    lab.wait(
        "the head says that it waits for the other node",
        lambda: "waits for node2" in lab.lockstep("status").stdout,
    )
    assert not (lab.runs / name / "attempts" / "2").exists()
    assert lab.lockstep("lab", "start", "node2").returncode == 0
    lab.finished(name)
    records = lab.metrics(name)
    assert {record["attempt"] for record in records} == {1, 2}
    assert next(record["step"] for record in records if record["attempt"] == 2) > 1
    lab.write_job(**job)
    lab.converge()
    assert (
        lab.shell("node1", f"{unit}; ls -d /var/lib/lockstep/autostart* 2>&1; true").count(
            "No such"
        )
        == 1
    )
    assert lab.verify()["verdict"] == "ok"


@pytest.mark.slow
def test_a_drained_job_goes_on_where_it_ended_after_all_nodes_were_rebooted(lab: Site) -> None:
    name = "drained"
    job = lab.write_job(name=name, trainer={"steps": 600, "checkpoint": {"every": 1000}})
    done = lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}")
    assert done.returncode == 0, done.stderr[-3000:]
    refused = lab.lockstep("reboot", "node2")
    assert refused.returncode == 2 and f"job {name} runs on node2: add --drain" in refused.stderr
    rebooted = lab.lockstep("reboot", "--all", "--drain", "--json")
    report = json.loads(rebooted.stdout)
    assert [(each["node"], each["state"]) for each in report["nodes"]] == [
        ("node2", "back"),
        ("node1", "back"),
    ], rebooted.stderr
    assert report["findings"] == [] and rebooted.returncode == 0
    (drained,) = report["drained"]
    last = int(drained["checkpoint"].removeprefix("step-"))
    assert 0 < last < 600
    lab.converge()
    lab.finished(name)
    resumed = next(record["step"] for record in lab.metrics(name) if record["attempt"] == 2)
    assert last < resumed <= last + 10, "not one step was lost; every tenth is written down"


def test_a_control_process_killed_while_it_starts_a_job_needs_one_more_run(
    lab: Site,
) -> None:
    job = lab.write_job(name="killed")
    process = subprocess.Popen(
        [str(BIN / "pyinfra"), "inventory.py", "deploy/train.py", "-y", "--data", f"job={job}"],
        cwd=ROOT,
        env=lab.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    plan = lab.runs / "killed" / "attempts" / "1" / "plan.json"
    end = time.monotonic() + 180
    while not plan.exists() and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()
    # Nearly as long ago as somebody may be starting it, so that the run waits, but not for that long.
    planned = json.loads(plan.read_text())
    planned["started"] -= STARTING_SECONDS - 15
    plan.write_text(json.dumps(planned))
    lab.converge()
    lab.finished("killed")
    assert lab.verify()["verdict"] == "ok"


def test_a_changed_config_of_a_started_job_is_refused_with_the_way_out(lab: Site) -> None:
    job = lab.write_job(name="cut", trainer={"steps": 130, "checkpoint": {"every": 10}})
    done = lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trainer.steps" in done.stderr and "another name" in done.stderr


def test_an_own_error_is_failed_and_not_started_again_unless_asked(lab: Site) -> None:
    job = lab.write_job(
        name="broken",
        trainer={"data": {**JOB["trainer"]["data"], "files": ["/shared/nothing/*.txt"]}},
    )
    first = lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}")
    assert first.returncode == 1 and "/shared/nothing" in first.stderr, first.stderr[-2000:]
    again = lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}")
    assert "retry=true" in again.stderr
    attempts = lab.runs / "broken" / "attempts"
    assert [path.name for path in attempts.iterdir()] == ["1"]
    lab.pyinfra("deploy/train.py", "-y", "--data", f"job={job}", "--data", "retry=true")
    assert sorted(path.name for path in attempts.iterdir()) == ["1", "2"]


def test_a_limit_converges_that_node_though_the_head_is_dead_and_starts_no_job(
    lab: Site,
) -> None:
    lab.write_job(name="limited")
    assert lab.lockstep("lab", "cut", "node1").returncode == 0
    try:
        lab.shell("node2", "sed -i '/node1$/d' /etc/hosts")
        done = lab.pyinfra("deploy/cluster.py", "-y", "--limit", "node2")
        assert "Traceback" not in done.stderr
        assert "not started" in done.stderr and "node1" in done.stderr
        assert "node1" in lab.shell("node2", "cat /etc/hosts")
        assert not (lab.runs / "limited").exists()
    finally:
        assert lab.lockstep("lab", "start", "node1").returncode == 0


def test_a_limit_that_matches_nothing_is_an_error(lab: Site) -> None:
    done = lab.pyinfra("deploy/cluster.py", "-y", "--limit", "node9")
    assert done.returncode != 0 and "node9" in done.stderr and "Traceback" not in done.stderr


def test_a_node_whose_look_fails_is_left_alone_while_the_other_converges(lab: Site) -> None:
    lab.shell("node2", "mv /usr/bin/timeout /usr/bin/timeout.away; sed -i '/node1$/d' /etc/hosts")
    lab.shell("node1", "sed -i '/node2$/d' /etc/hosts")
    try:
        done = lab.pyinfra("deploy/cluster.py", "-y")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "node2" in lab.shell("node1", "cat /etc/hosts")
        assert "10.77" not in lab.shell("node2", "grep 'node1$' /etc/hosts", check=False)
        assert lab.verify()["verdict"] == "unreadable"
    finally:
        lab.shell("node2", "mv /usr/bin/timeout.away /usr/bin/timeout")


@pytest.mark.parametrize("ending", ["Ctrl-C", "kill -9", "power cut"])
def test_an_interrupted_unpacking_is_never_taken_for_whole(lab: Site, ending: str) -> None:
    lab.shell("node2", "rm -rf /opt/lockstep/envs/*")
    process = subprocess.Popen(
        [str(BIN / "pyinfra"), "inventory.py", "deploy/cluster.py", "-y"],
        cwd=ROOT,
        env=lab.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    # Held up, so that it is seen half done: what was begun on a node goes on there.
    hold = "for i in $(seq 1800); do pkill -STOP -x tar && exit 0; sleep 0.1; done; exit 1"
    lab.shell("node2", hold)
    if ending == "power cut":
        assert lab.lockstep("lab", "cut", "node2").returncode == 0
    else:
        os.kill(process.pid, signal.SIGINT if ending == "Ctrl-C" else signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == {"Ctrl-C": 130, "kill -9": -9, "power cut": 1}[ending]
    assert b"Traceback" not in output
    if ending == "power cut":
        assert lab.lockstep("lab", "start", "node2").returncode == 0
    try:
        assert "environment-missing" in {finding["id"] for finding in lab.verify()["findings"]}
    finally:
        lab.shell("node2", "pkill -CONT -x tar", check=False)
    lab.converge()
    assert lab.verify()["verdict"] == "ok"
    assert lab.shell("node2", "ls -A /opt/lockstep/envs").split() == ["main"]


def test_a_changed_host_key_is_refused_until_it_is_trusted(lab: Site) -> None:
    lab.shell(
        "node2", "rm -f /etc/ssh/ssh_host_*; ssh-keygen -A >/dev/null; systemctl restart sshd"
    )
    assert lab.verify()["verdict"] == "unreadable"
    hosts = lab.shell("node1", "cat /etc/ssh/ssh_known_hosts")
    done = lab.pyinfra("deploy/cluster.py", "-y")
    assert (
        done.returncode != 0
        and "lockstep trust node2" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert lab.shell("node1", "cat /etc/ssh/ssh_known_hosts") == hosts
    assert lab.lockstep("trust", "node2", "--yes").returncode == 0
    lab.converge()
    assert lab.verify()["verdict"] == "ok"


def test_no_secret_is_in_a_log_and_no_private_key_is_readable_by_others(lab: Site) -> None:
    declared = yaml.safe_load(lab.cluster.read_text())
    password = Path(declared["nodes"]["node2"]["ssh"]["sudo"]["password_file"]).read_text().strip()
    done = lab.pyinfra("deploy/cluster.py", "-y", "-vvv", "--debug")
    assert password not in done.stdout + done.stderr
    assert password not in json.dumps(
        [
            path.read_text(errors="replace")
            for path in lab.runs.rglob("*")
            if path.suffix in (".json", ".log", ".yaml", ".jsonl")
        ]
    )
    for node in NODES:
        assert password not in lab.shell(node, "journalctl -q -o cat")
        loose = lab.shell(
            node, "grep -rlE --include='*' 'BEGIN [A-Z ]*PRIVATE KEY' /root/.ssh /etc/ssh | xargs -r stat -c '%a %n' | grep -v '^600 ' || true"
        )  # fmt: skip
        assert loose == ""
