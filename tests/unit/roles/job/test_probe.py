"""What a node's look says, and that the probe says it of real files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from roles.core.role import Unreadable
from roles.job.probe import ErrorRecord, Exit, Unit, parse, script
from trainer.files import write_json

RECORDED = (Path(__file__).parent / "recorded" / "look.txt").read_text().rstrip("\n")

UNITS = "Id=lockstep-light.service\nDescription=Lockstep job light, attempt 2\nActiveState=active\nResult=success"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory with an ip and a systemctl that answer as a node's do."""
    directory = tmp_path / "bin"
    directory.mkdir()
    addresses = (
        "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth0@if7    inet6 fd00::7/64 scope global"
    )
    for name, answer in (("ip", addresses), ("systemctl", UNITS)):
        (directory / name).write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        (directory / name).chmod(0o755)
    return directory


def look(run: Path | None, tools: Path, shell: str = "sh") -> subprocess.CompletedProcess[str]:
    """The probe's output on this machine."""
    return subprocess.run(
        [shell, "-c", script(str(run) if run else None)],
        capture_output=True,
        text=True,
        env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )


def test_a_recorded_look_is_read_as_a_whole() -> None:
    state = parse(RECORDED)
    assert (state.cores, state.gpus, state.now) == (64, 8, 1795222733)
    assert state.interfaces["10.77.9.11"] == "host0"
    assert state.listening == {22, 0x733C, 443}
    assert state.units == (
        Unit("light", 3, "active", "success"),
        Unit("old-one", 12, "failed", "exit-code"),
    )
    assert state.unit("light") == Unit("light", 3, "active", "success")
    assert state.declared == {"fingerprint": "f00d", "job": {"name": "light"}}
    assert state.metrics is not None and state.metrics["step"] == 40
    assert (state.checkpoint, state.attempts, state.complete) == ("step-00000040", 3, None)
    assert state.attempt is not None
    assert state.attempt.plan.master_port == 29501
    assert state.attempt.exits == {"node2": Exit("oom-kill", "killed", "KILL", asked=True)}
    assert [error.kind for error in state.attempt.errors] == ["own", "peer"], "in order of time"
    assert state.attempt.errors[0] == ErrorRecord(
        "own", 9, "gpu-b", '文件 "x" 不存在', 1795222730.25
    )


@pytest.mark.parametrize(
    "change",
    [
        ("boot 807a7e81", "bout 807a7e81"),
        ("now 1795222733", "now soon"),
        ("port 0016", "port ssh"),
        ("address 127.0.0.1 lo", "address 127.0.0.1"),
        ('plan {"attempt": 3', 'plan {"atempt": 3'),
        ('"boot_ids": {"node1": "a", "node2": "b"}', '"boot_ids": {"node1": "a"}'),
        ('plan {"attempt": 3', 'plan {"attempt": '),
        ("exit node2 oom-kill killed KILL", "exit node2"),
        ('error ["peer", 0,', 'error ["peer", '),
        ('job {"fingerprint"', 'job ["fingerprint"'),
    ],
)
def test_garbage_is_refused(change: tuple[str, str]) -> None:
    assert change[0] in RECORDED
    with pytest.raises(Unreadable):
        parse(RECORDED.replace(*change))


def test_nothing_is_refused() -> None:
    with pytest.raises(Unreadable):
        parse("end")


def test_a_torn_last_record_leaves_the_one_before() -> None:
    torn = RECORDED.replace('"eta_s": 12.5, "attempt": 3}', '"eta')
    state = parse(torn)
    assert state.metrics is not None and state.metrics["step"] == 39


def test_the_probe_reports_the_nodes_own_facts_without_a_job(tools: Path) -> None:
    done = look(None, tools)
    assert (done.returncode, done.stderr) == (0, "")
    state = parse(done.stdout.rstrip("\n"))
    assert state.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert state.cores >= 1
    assert state.interfaces == {"127.0.0.1": "lo", "fd00::7": "eth0"}
    assert state.units == (Unit("light", 2, "active", "success"),)
    assert (state.attempts, state.attempt) == (0, None)


def test_a_run_directory_that_is_not_there_is_an_absent_job(tools: Path, tmp_path: Path) -> None:
    done = look(tmp_path / "runs" / "light", tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse(done.stdout.rstrip("\n")).attempts == 0


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_probe_reports_a_run_directory(tools: Path, tmp_path: Path, shell: str) -> None:
    run = tmp_path / "it's a run"
    for attempt in (2, 9, 10, 11):
        (run / "attempts" / str(attempt)).mkdir(parents=True)
    (run / "attempts" / ".new-1").mkdir()
    plan = {
        "attempt": 10,
        "nodes": ["node1", "node2"],
        "boot_ids": {"node1": "a", "node2": "b"},
        "master_address": "10.0.0.1",
        "master_port": 29500,
        "world_size": 2,
        "processes": 1,
        "started": 5,
    }
    last = run / "attempts" / "10"
    write_json(run / "attempts" / "9" / "plan.json", {**plan, "attempt": 9})
    write_json(last / "plan.json", plan)
    (last / "stopped").touch()
    (last / "node2.asked").touch()
    (last / "node1.exit").write_text("exit-code exited 1\n")
    (last / "node2.exit").write_text("success killed TERM\n")
    record = {"kind": "own", "host": "h", "rank": 1, "error": 'a "b" 中\\n', "traceback": "x\n y"}
    write_json(last / "rank-00001.error.json", {**record, "time": 7.5})
    write_json(last / "rank-00000.error.json", {**record, "kind": "peer", "rank": 0, "time": 8.5})
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    for step in ("step-00000010", "step-00000020", "step-00000030"):
        (run / "checkpoints" / step).mkdir(parents=True)
    for step in ("step-00000010", "step-00000020"):
        (run / "checkpoints" / step / "COMPLETE").touch()
    write_json(run / "complete.json", {"step": 2})

    done = look(run, tools, shell)
    assert (done.returncode, done.stderr) == (0, "")
    state = parse(done.stdout.rstrip("\n"))
    assert state.attempts == 11, "directories without a plan count for the next number"
    assert state.attempt is not None and state.attempt.plan.attempt == 10
    assert state.attempt.stopped
    assert state.attempt.exits == {
        "node1": Exit("exit-code", "exited", "1"),
        "node2": Exit("success", "killed", "TERM", asked=True),
    }
    assert state.attempt.errors == (
        ErrorRecord("own", 1, "h", 'a "b" 中\\n', 7.5),
        ErrorRecord("peer", 0, "h", 'a "b" 中\\n', 8.5),
    )
    assert state.metrics == {"step": 2}
    assert state.checkpoint == "step-00000020"
    assert state.complete == {"step": 2}


def test_many_lost_ranks_stay_a_small_look(tools: Path, tmp_path: Path) -> None:
    last = tmp_path / "run" / "attempts" / "1"
    last.mkdir(parents=True)
    (last / "plan.json").write_text(
        json.dumps(
            {
                "attempt": 1,
                "nodes": ["n"],
                "boot_ids": {"n": "a"},
                "master_address": "10.0.0.1",
                "master_port": 29500,
                "world_size": 96,
                "processes": 96,
                "started": 5,
            }
        )
    )
    for rank in range(96):
        content = {"kind": "peer", "host": "h", "rank": rank, "error": "e" * 1000, "time": 1.0}
        write_json(last / f"rank-{rank:05d}.error.json", content)
    done = look(tmp_path / "run", tools)
    state = parse(done.stdout.rstrip("\n"))
    assert state.attempt is not None and len(state.attempt.errors) == 96
    assert len(done.stdout) < 24_000


def test_what_is_not_permitted_is_no_absence(tools: Path, tmp_path: Path) -> None:
    (tmp_path / "light").write_text("a file, no directory")
    done = look(tmp_path / "light", tools)
    assert done.returncode == 3
    assert "is no directory" in done.stderr


def test_a_node_without_systemd_could_not_be_looked_at(tools: Path) -> None:
    (tools / "systemctl").write_text("#!/bin/sh\necho 'System has not been booted' >&2; exit 1\n")
    done = look(None, tools)
    assert done.returncode == 3
