"""Small file habits of the lab: whole or absent, modes never wider than asked, removal that stays inside.

A killed command must leave either the old file or the new one, so everything is written beside its
place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.lab.errors import LabError

PARTIAL = ".partial-"
"""Part of the name of everything that is still being built; never read, always removable."""
BUSY_SECONDS = 10.0


def partial_beside(path: Path) -> Path:
    """A new name next to ``path`` for what will be renamed to it."""
    return path.with_name(f"{path.name}{PARTIAL}{secrets.token_hex(4)}")


def write_whole(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Replace a file at once, with exactly that mode from its first byte on."""
    data = content.encode() if isinstance(content, str) else content
    beside = partial_beside(path)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Replace a JSON file at once."""
    write_whole(path, json.dumps(value, indent=2) + "\n", mode)


def read_json(path: Path) -> Any:
    """The value of a JSON file, or None when there is no whole one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def make_directory(path: Path, mode: int = 0o755) -> Path:
    """A directory with exactly that mode, whatever the umask."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    return path


def mounts_below(path: Path, mountinfo: str) -> list[str]:
    """Mount points at or below a path, deepest first, from the text of /proc/self/mountinfo."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split()
        point = fields[4].encode().decode("unicode_escape") if len(fields) > 4 else ""
        if point == str(path) or point.startswith(f"{path}/"):
            found.append(point)
    return sorted(found, key=len, reverse=True)


def remove_tree(path: Path) -> None:
    """Remove a directory tree of the lab, after unmounting what is mounted in it.

    Raises LabError when a mount stays: removing through it would delete what is mounted there.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    for point in mounts_below(path, Path("/proc/self/mountinfo").read_text()):
        if subprocess.run(["umount", "--", point], capture_output=True).returncode != 0:
            subprocess.run(["umount", "--lazy", "--", point], capture_output=True)
    left = mounts_below(path, Path("/proc/self/mountinfo").read_text())
    if left:
        raise LabError(
            f"{left[0]} is still mounted and cannot be removed: unmount it, then run again"
        )
    until = time.monotonic() + BUSY_SECONDS
    while True:
        done = subprocess.run(
            ["rm", "-rf", "--one-file-system", "--", str(path)], capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        # A killed build may need a moment to be gone, and writes until then.
        if time.monotonic() > until:
            said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise LabError(
                f"cannot remove {path} ({said}): see which process uses it with `fuser -v`"
            )
        time.sleep(0.2)


def remove_meanwhile(path: Path) -> None:
    """Have a big tree that nobody uses removed by a process of its own, so that nobody waits for the disk.

    The name must be a partial one: what a reboot leaves of it is then removed by the next command.
    """
    subprocess.Popen(
        ["rm", "-rf", "--one-file-system", "--", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def retire(path: Path) -> None:
    """Remove a directory that counts as whole: renamed first, so that a killed removal leaves no half of it."""
    if path.exists():
        beside = partial_beside(path)
        path.rename(beside)
        remove_tree(beside)


def remove_partials(directory: Path, prefix: str = "") -> None:
    """Remove what killed builds of things with that prefix left in a directory."""
    if directory.is_dir():
        for entry in directory.iterdir():
            if PARTIAL in entry.name and entry.name.startswith(prefix):
                remove_tree(entry)


@contextlib.contextmanager
def building(path: Path, *, keep_first: bool = False) -> Iterator[Path]:
    """A new directory beside ``path`` that becomes ``path`` when the block ends well.

    A block that fails leaves nothing; one that is killed leaves a directory that is never taken for whole.
    keep_first: where somebody else put the same there meanwhile, that stays, and this one goes.
    """
    beside = partial_beside(path)
    beside.mkdir(parents=True, mode=0o755)
    beside.chmod(0o755)
    try:
        yield beside
        try:
            beside.rename(path)
        except OSError:
            if not (keep_first and path.is_dir()):
                raise
            remove_tree(beside)
    except BaseException:
        remove_tree(beside)
        raise
