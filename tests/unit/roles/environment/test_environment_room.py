"""Disks are judged before anything comes to them: the archive, what is unpacked of it, or both on one disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Target
from roles.core.steps import Upload
from roles.environment.archive import Archive
from roles.environment.converge import prepare
from roles.environment.room import room, room_for_archive
from roles.environment.spec import Declared, Environments

MIB = 1 << 20
ARCHIVE = Archive("ab" * 32, 1000 * MIB, "tar", "", "3.11", "bin/python3", None, entries=5000)
DF = """#!/bin/sh
case $2 in -k) n=$KIB;; -i) n=$INODES;; esac
case $2$3 in -k{other}*) n=$OTHER;; esac
printf 'head\\ndisk 999999 0 %s 0%% %s\\n' "$n" "$3"
"""

Judge = Callable[..., str]


@pytest.fixture
def other() -> Iterator[Path]:
    """A folder on another disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def judge(tmp_path: Path, other: Path) -> Judge:
    """Runs such shell where disks have so many MiB free; what it complains, or nothing."""
    df = tmp_path / "tools/df"
    df.parent.mkdir()
    df.write_text(DF.replace("{other}", str(other)))
    df.chmod(0o755)

    def run(script: str, free: int, on_other: int = 0, files: str = "9999") -> str:
        told = {"KIB": free * 1024, "OTHER": on_other * 1024, "INODES": files}
        environ = {key: str(value) for key, value in told.items()}
        environ["PATH"] = f"{df.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["dash", "-ec", script], env=environ, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == (done.stderr == "")
        return done.stderr.strip()

    return run


def environment(prefix: Path) -> Declared:
    section = Environments.model_validate({"llm": {"archive": "/x.tar"}})
    return replace(section.each()[0], prefix=str(prefix))


@pytest.fixture
def coming(tmp_path: Path) -> Upload:
    """An archive of 300 MiB that comes to a folder of this disk which is not there yet."""
    source = tmp_path / "source.tar"
    source.touch()
    os.truncate(source, 300 * MIB)
    return Upload(source, str(tmp_path / "depot/archives/x.tar"), ARCHIVE.sha256)


def test_a_disk_must_hold_the_archive_and_what_is_unpacked_of_it(
    tmp_path: Path, judge: Judge, coming: Upload
) -> None:
    one = environment(tmp_path / "not/yet/llm")
    both = f"no room for llm and its archive: {tmp_path} has 1300 MiB free, 1428 are needed"
    assert judge(room(one, ARCHIVE, [coming]), 1300) == both
    assert judge(room(one, ARCHIVE, [coming]), 1429) == ""
    assert judge(room(one, ARCHIVE, []), 1300) == ""
    alone = f"no room for llm: {tmp_path} has 1000 MiB free, 1064 are needed"
    assert judge(room(one, ARCHIVE, []), 1000) == alone
    assert judge(room(one, ARCHIVE, []), 1300, files="100").endswith(
        "100 more files, 6000 are needed"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"tools", "source.tar"}


def test_what_arrived_before_needs_no_room_again(
    tmp_path: Path, judge: Judge, coming: Upload
) -> None:
    Path(coming.part).parent.mkdir(parents=True)
    Path(coming.part).touch()
    os.truncate(coming.part, 200 * MIB)
    assert judge(room(environment(tmp_path / "llm"), ARCHIVE, [coming]), 1300) == ""
    assert judge(room_for_archive(environment(tmp_path / "llm"), coming), 165) == ""


def test_each_of_two_disks_is_judged_by_what_comes_to_it(
    other: Path, tmp_path: Path, judge: Judge, coming: Upload
) -> None:
    one = environment(other / "llm")
    assert judge(room(one, ARCHIVE, [coming]), 400, on_other=1100) == ""
    archive = f"no room for the archive of llm: {tmp_path} has 300 MiB free, 364 are needed"
    assert judge(room(one, ARCHIVE, [coming]), 300, on_other=1100) == archive
    assert judge(room_for_archive(one, coming), 300) == archive
    tree = f"no room for llm: {other} has 900 MiB free, 1064 are needed"
    assert judge(room(one, ARCHIVE, [coming]), 400, on_other=900) == tree


def test_a_file_system_that_does_not_say_what_is_free_is_no_obstacle(
    tmp_path: Path, judge: Judge, coming: Upload
) -> None:
    script = room(environment(tmp_path / "llm"), ARCHIVE, [coming])
    assert judge(script, 1500, files="-") == ""


def test_archives_of_earlier_versions_and_broken_changes_make_room_first(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roles.environment.parcel.LOCAL", str(tmp_path / "lockstep"))
    monkeypatch.setattr(sys.modules[prepare.__module__], "archive_of", lambda *_: ARCHIVE)
    archives, prefix = tmp_path / "lockstep/archives", tmp_path / "llm"
    wanted = {ARCHIVE.file_name, f".{ARCHIVE.file_name}.arriving"}
    for name in (*wanted, f"{'cd' * 32}.tar", f".{'cd' * 32}.tar.arriving"):
        (archives / name).mkdir(parents=True)
    Path(f"{prefix}.lockstep-new-cd").mkdir()
    one = environment(prefix)
    section = Environments.model_validate({"llm": one.spec})
    node = Node(name="node1", address="10.0.0.1")
    cluster = Cluster(
        "lab", tmp_path / "x.yaml", {"node1": node}, sections={"environments": section}
    )
    script = prepare(Target(cluster, node, section), one, ARCHIVE, [])
    assert "no room for llm" in judge(script, 10)
    assert {path.name for path in archives.iterdir()} == wanted
    assert not list(tmp_path.glob("llm*"))
