"""Storage whose server takes root for another user: played by a user who may give no file away."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roles.core import session
from roles.core.chain import Chain, upload
from roles.core.steps import Upload, UploadFolder, owned, write_file
from roles.core.upload import upload_folder

NOBODY: dict[str, Any] = (
    {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that was given to the user whom the server takes root for."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    if NOBODY:
        os.chown(path, 65534, 65534)
    yield path
    shutil.rmtree(path)


def sh(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"set -e\n{script}"], capture_output=True, text=True, cwd="/", **NOBODY
    )


@pytest.fixture
def node(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node that is entered as root, and is nobody on the storage."""

    def run(_: Any, script: str, *__: Any) -> session.Output:
        done = sh(script)
        if done.returncode:
            raise session.NodeFailed(done.stderr.strip().split("\n")[-1])
        return session.Output(done.stdout.strip(), done.stderr)

    def put_file(source: Any, place: str, **_: Any) -> bool:
        text = source.read() if hasattr(source, "read") else Path(source).read_text()
        done = subprocess.run(["sh", "-c", f"cat >{place}"], input=text, text=True, **NOBODY)
        return done.returncode == 0

    monkeypatch.setattr(session, "run", run)
    return SimpleNamespace(
        name="node1",
        data={"ssh_user": "root"},
        connector=SimpleNamespace(client=None),
        put_file=put_file,
    )


def test_a_file_is_written_there_and_stays_the_servers_users(shared: Path) -> None:
    path = shared / "runs" / "it's one" / "plan.json"
    for text in ("one", "two"):
        done = sh(write_file(str(path), text, mode="0600", backup=False))
        assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text() == "two" and path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="somebody else's file is made")
def test_what_is_somebody_elses_there_is_not_taken_for_roots(shared: Path) -> None:
    (shared / "strange").touch()
    done = sh(owned(str(shared / "strange")))
    assert done.returncode == 1 and "strange cannot be given to root" in done.stderr
    assert [each.name for each in shared.iterdir()] == ["strange"]


def test_files_and_folders_are_brought_there(shared: Path, node: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    step = Upload(source, str(shared / "depot" / "archive"), sha256)
    upload(node, step, Chain(step, {}))
    assert (shared / "depot/archive").read_text() == "weights"
    upload_folder(node, UploadFolder({"a/b": (source, sha256)}, str(shared / "wheels")))
    assert (shared / "wheels/a/b").read_text() == "weights"
    assert sorted(each.name for each in shared.rglob("*")) == [
        "a",
        "archive",
        "b",
        "depot",
        "wheels",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="a directory is given to another user")
def test_another_login_than_root_cannot_send_files_there_and_is_told_why(
    shared: Path, node: Any, tmp_path: Path
) -> None:
    node.data["ssh_user"] = "daemon"
    (tmp_path / "source").touch()
    step = Upload(tmp_path / "source", str(shared / "archive"), "0" * 64)
    with pytest.raises(session.NodeFailed, match="cannot be given to daemon, .* log in as root"):
        upload(node, step, Chain(step, {}))
