"""Parcels: what another node brought to the shared storage is waited for, as a client of NFS may not see it yet."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from roles.core import steps
from roles.core.steps import quote
from roles.environment.parcel import intact


def used(place: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    sha256 = hashlib.sha256(b"whole").hexdigest()
    script = f"{before}{intact(sha256, quote(str(place)))}echo used"
    return subprocess.run(["sh", "-ec", script], capture_output=True, text=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "a depot" / "wheels"
    folder.mkdir(parents=True)
    return folder / "one.whl"


def test_what_is_not_seen_yet_is_waited_for(place: Path) -> None:
    done = used(place, f"(sleep 1; printf whole >{quote(str(place))}) & ")
    assert (done.returncode, done.stdout, done.stderr) == (0, "used\n", "")


def test_the_last_folder_that_is_seen_is_listed_until_the_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of NFS sees what is new in a folder once it lists it."""
    root, tools = tmp_path / "shared", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    (tools / "ls").write_text(
        f"#!/bin/sh\ncase $1 in {root}) mkdir {root}/a;; {root}/a) mkdir {root}/a/b;;\n"
        f"  {root}/a/b) echo whole >{root}/a/b/file;; *) exit 2;; esac\n"
    )
    (tools / "ls").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(steps, "APPEAR_SECONDS", 3)
    command = steps.appears(f"{root}/a/b/file", "gone") + f"cat {root}/a/b/file"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")


def test_what_does_not_come_is_told_and_what_is_damaged_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "APPEAR_SECONDS", 1)
    done = used(place)
    assert done.returncode == 1 and done.stderr == f"{place} is not seen here: converge again\n"
    place.write_bytes(b"half")
    done = used(place)
    assert done.returncode == 1 and not place.exists()
    assert done.stderr == f"{place} was damaged, and is removed: converge again\n"
