"""A control group of its own for every node, on hosts without systemd.

nspawn boots its payload in the group that it is started in. Two nodes started in the same group would
share one tree, and restarting a service in one would kill that of the other. A host with systemd makes
a scope for each container itself, so nothing is done there.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

PARENT = "lockstep-lab"


def hierarchies(mountinfo: str) -> list[Path]:
    """Where processes are grouped by name: the unified hierarchy and the legacy one of systemd."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split()
        if "-" not in fields:
            continue
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(fields[4]))
    return found


def host_has_systemd(marker: Path = Path("/run/systemd/system")) -> bool:
    """Whether systemd is this host's init, and so gives each container a scope."""
    return marker.is_dir()


def _groups(name: str) -> list[Path]:
    roots = hierarchies(Path("/proc/self/mountinfo").read_text())
    return [root / PARENT / name for root in roots]


def enter(name: str) -> None:
    """Put this process, and what it starts, into the node's group. Raises OSError."""
    for group in _groups(name):
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.procs").write_text(f"{os.getpid()}\n")


def leave_and_remove(name: str) -> bool:
    """Remove the node's group and all below it; False when something still runs in it."""
    removed = True
    for group in _groups(name):
        for _ in range(20):
            for directory, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            if not group.exists():
                break
            time.sleep(0.05)
        removed = removed and not group.exists()
        with contextlib.suppress(OSError):
            group.parent.rmdir()
    return removed
