"""Files are written whole, backed up once, and blocks never touch what is outside them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from roles.core.steps import ON_DISK, block_lines, managed_block, settled, write_file


def sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given to root")
def test_a_written_file_has_exactly_the_text_and_mode_and_the_first_version_is_kept(
    tmp_path: Path,
) -> None:
    path = tmp_path / "it's here" / "file"
    path.parent.mkdir()
    path.write_text("by hand\n")
    sh(write_file(str(path), "one 'two' $three\n", mode="0640"))
    sh(write_file(str(path), "second\n", mode="0640"))
    assert path.read_text() == "second\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert Path(f"{path}.before-lockstep").read_text() == "by hand\n"
    assert sorted(each.name for each in path.parent.iterdir()) == ["file", "file.before-lockstep"]


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given to root")
def test_a_written_file_gets_its_own_label_back_where_selinux_is_on(tmp_path: Path) -> None:
    restorecon = tmp_path / "restorecon"
    restorecon.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/said; exit 1\n')
    restorecon.chmod(0o755)
    write = write_file(str(tmp_path / "file"), "text\n")
    for switch in (tmp_path / "none", tmp_path):
        sh(f"PATH={tmp_path}:$PATH\n{write.replace('/sys/fs/selinux/enforce', str(switch))}")
    assert (tmp_path / "said").read_text() == f"{tmp_path}/file\n"


def test_a_block_is_added_at_the_end_and_replaced_in_place() -> None:
    first = managed_block("a\n", "hosts", ["x"])
    assert first == "a\n# lockstep hosts: begin\nx\n# lockstep hosts: end\n"
    assert managed_block(first + "b\n", "hosts", ["y", "z"]) == (
        "a\n# lockstep hosts: begin\ny\nz\n# lockstep hosts: end\nb\n"
    )


def test_an_empty_block_is_taken_out() -> None:
    assert managed_block(managed_block("a\n", "hosts", ["x"]) + "b\n", "hosts", []) == "a\nb\n"


def test_a_begin_without_an_end_loses_only_the_mark() -> None:
    assert managed_block("a\n# lockstep hosts: begin\nb\n", "hosts", ["x"]) == (
        "a\nb\n# lockstep hosts: begin\nx\n# lockstep hosts: end\n"
    )


def test_block_lines_are_none_without_a_whole_block() -> None:
    assert block_lines("# lockstep hosts: begin\nx\n", "hosts") is None
    assert block_lines(managed_block("", "hosts", ["x", "y"]), "hosts") == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "given"), [("  -f, --file-system  sync that alone", "-f /place"), ("", "")]
)
def test_a_sync_that_knows_no_file_systems_syncs_everything(
    tmp_path: Path, options: str, given: str
) -> None:
    sync = tmp_path / "sync"
    sync.write_text(
        f'#!/bin/sh\ntest "$1" = --help && echo "{options}" || echo "$*" >>{tmp_path}/given\n'
    )
    sync.chmod(0o755)
    sh(f"PATH={tmp_path}:$PATH\n{settled('/place')}\n")
    assert (tmp_path / "given").read_text() == f"{given}\n"


@pytest.mark.parametrize(
    ("ends", "failed"), [("exit 0", False), ("exec /bin/sleep 30", False), ("exit 1", True)]
)
def test_a_disk_that_is_too_busy_is_left_behind_but_one_that_breaks_is_told(
    tmp_path: Path, ends: str, failed: bool
) -> None:
    """The pauses are none here: a minute of them is over at once."""
    for name, text in (
        ("sync", f'test "$1" != --help || exit 0\necho $$ >{tmp_path}/pid\n{ends}'),
        ("sleep", f"test -e {tmp_path}/pid || exec /bin/sleep 0.1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = f"set -e\nPATH={tmp_path}:$PATH\n{ON_DISK.command}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == failed
    assert done.stderr == ("what was changed did not reach the disk: see dmesg\n" if failed else "")
    if "sleep" in ends:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
