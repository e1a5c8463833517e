"""The place of runs apart from the storage: an empty one in its stead never makes a job start again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roles.core.role import Finding, Target
from roles.core.steps import Shell
from roles.job.converge import converge
from roles.job.declared import _read_once
from roles.job.drift import drift
from roles.job.place import apart
from roles.job.probe import JobState, parse, probe
from roles.job.spec import JobSpec
from roles.storage.probe import TOKEN_FILE, Mark, Mount, StorageState, token_file
from roles.storage.spec import StorageSpec

from .conftest import JOB, fresh, view

Make = Callable[..., Target[JobSpec]]

TOKENS = {"node1": "1" * 32, "node2": "2" * 32}
PLACE = StorageState(
    access="yes",
    real="/big/runs",
    mount=Mount("/big", "nfs4", "fs:/big", ("rw", "hard")),
    writable=True,
    free=50_000,
    mark=Mark("5eed", "7", "1700000000"),
    tokens={name: (token,) for name, token in TOKENS.items()},
)
PLAIN = Mount("/", "ext4", "/dev/sda1", ("rw",))


def place(name: str, **changes: Any) -> StorageState:
    return replace(PLACE, **{"token": TOKENS[name], **changes})


@pytest.fixture
def big(target: Make) -> Make:
    """The job role's target where runs.path is apart from the storage."""

    def make(name: str = "node1", path: str = "/big/runs", **changes: Any) -> Target[JobSpec]:
        return replace(target(name, **changes), spec=JobSpec(path=path))

    return make


def judged(big: Make, *, node1: dict[str, Any], node2: dict[str, Any]) -> dict[str, list[Finding]]:
    looks = {
        "node1": fresh("node1", place=place("node1", **node1)),
        "node2": fresh("node2", place=place("node2", **node2)),
    }
    return {
        name: drift(big(name), looks[name], {other: looks[other]})
        for name, other in (("node1", "node2"), ("node2", "node1"))
    }


def test_a_right_place_is_said_nothing_of_and_the_job_starts(big: Make) -> None:
    found = judged(big, node1={}, node2={})
    assert [[one.id for one in each] for each in found.values()] == [["job-absent"]] * 2


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({"mount": PLAIN, "mark": None, "tokens": {}}, "nfs-mount-wrong"),
        ({"access": "absent"}, "storage-missing"),
        ({"access": "stale"}, "nfs-stale-handle"),
        ({"access": "silent"}, "nfs-server-silent"),
        ({"mount": Mount("/big", "nfs4", "fs:/big", ("ro",))}, "storage-read-only"),
        ({"writable": False}, "nfs-root-squash"),
        ({"free": 1023}, "checkpoint-disk-full"),
        ({"mark": Mark("other", "7", "1700000000")}, "storage-different"),
    ],
)
def test_a_place_that_is_not_right_on_one_node_is_told_and_nothing_starts_there(
    big: Make, changes: dict[str, Any], id: str
) -> None:
    (found,) = judged(big, node1={}, node2=changes)["node2"]
    assert (found.id, found.repairable) == (id, False) and "/big" in found.want + found.fix


def test_mark_and_tokens_are_written_before_anything_is_launched(big: Make) -> None:
    new: dict[str, Any] = {"mark": None, "token": None, "tokens": {}}
    found = judged(big, node1=new, node2=new)
    ids = {name: [one.id for one in each] for name, each in found.items()}
    assert ids == {"node1": ["storage-mark", "storage-token"], "node2": ["storage-token"]}
    for name, findings in found.items():
        state = fresh(name, place=place(name, **new))
        steps = list(converge(big(name), state, {}, findings))
        assert steps and all(isinstance(step, Shell) for step in steps)
        text = "\n".join(step.command for step in steps if isinstance(step, Shell))
        assert "/big/runs" in text and f"{TOKEN_FILE}-big-runs" in text
        assert "plan.json" not in text and "systemctl" not in text


def test_what_belongs_to_the_storage_or_to_another_job_is_left_alone(big: Make) -> None:
    """Lockstep's mount of the storage, its unit for a shutdown, tokens of nodes that this job does not have."""
    beside = {"shutdown": "abc", "tokens": {**PLACE.tokens, "node3": ("3" * 32,)}}
    found = judged(big, node1=beside, node2=beside)
    assert [[one.id for one in each] for each in found.values()] == [["job-absent"]] * 2


def test_the_storage_role_judges_what_lies_on_its_path(big: Make, target: Make) -> None:
    assert apart(target()) is None
    assert apart(big(path="/shared/other")) is None
    there = apart(big(path="/shared2"))
    assert there is not None and token_file(there) == f"{TOKEN_FILE}-shared2"
    left = {"storage": StorageSpec(kind="existing", path="/shared", manage="unmanaged")}
    sections = {**target().cluster.sections, **left}
    assert apart(big(path="/shared/other", sections=sections)) is not None


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """An ip, a systemctl and a mountpoint that find nothing wrong."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ip", "systemctl", "mountpoint"):
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("under_it", ["nothing", "an earlier mark", "not even the directory"])
def test_the_only_node_of_a_job_knows_a_disk_that_is_gone(
    big: Make, tmp_path: Path, tools: Path, under_it: str
) -> None:
    """The disk is a directory that is moved away, as after a boot without it."""
    runs, disk = tmp_path / "runs", tmp_path / "disk"
    job = tmp_path / "alone.yaml"
    job.write_text(JOB + "nodes: [node2]\n")
    _read_once.cache_clear()
    on = big("node2", str(runs), job=job)

    def sh(text: str) -> str:
        done = subprocess.run(
            ["sh", "-c", f"set -e\n{text}".replace("/var/lib/lockstep", str(tmp_path / "own"))],
            env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def seen(mount: Mount | None = None) -> tuple[JobState, list[str]]:
        state = parse(sh(probe(on)).rstrip("\n"))
        if mount and state.place:
            state = replace(state, place=replace(state.place, mount=mount))
        return state, [one.id for one in drift(on, state, {})]

    def mend(mount: Mount | None = None) -> None:
        state, _ = seen(mount)
        for step in converge(on, state, {}, drift(on, state, {})):
            assert isinstance(step, Shell)
            sh(step.command)

    mount = None
    if under_it == "an earlier mark":  # runs lay here before there was a disk
        mend()
        runs.rename(tmp_path / "before")
        runs.mkdir()
        mount = Mount(str(runs), "xfs", "/dev/sdb", ("rw",))
    mend(mount)
    assert seen()[1] == ["job-interface"], "the place is right: the launch is next"
    (runs / "light/attempts/3").mkdir(parents=True)
    assert seen()[0].attempts == 3
    runs.rename(disk)
    if under_it == "nothing":
        runs.mkdir()
    elif under_it == "an earlier mark":
        (tmp_path / "before").rename(runs)
    state, ids = seen()
    assert ids == ["storage-lost"] and drift(on, state, {})[0].repairable is False
    if runs.exists():
        runs.rename(tmp_path / "gone")
    disk.rename(runs)
    assert seen()[0].attempts == 3 and seen()[1] == ["job-interface"]


def test_no_run_is_read_where_the_place_gives_no_answer(
    big: Make, tmp_path: Path, tools: Path
) -> None:
    (tmp_path / "runs/light/attempts/3").mkdir(parents=True)
    (tools / "timeout").write_text("#!/bin/sh\nexit 137\n")
    (tools / "timeout").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", probe(big("node1", str(tmp_path / "runs")))],
        env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
    )
    state = parse(done.stdout.rstrip("\n"))
    assert state.place is not None and state.place.access == "silent" and state.attempts == 0


def test_a_launch_is_no_part_of_mending_the_place(big: Make) -> None:
    lost = view("node1", units=(), place=place("node1", token=None))
    steps = list(converge(big(), lost, {}, []))
    assert steps == []
