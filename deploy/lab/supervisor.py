"""The process that keeps one container: mounts its root, runs nspawn, and starts it again when it reboots.

Started detached by ``node.start_supervisor`` inside a mount namespace of its own, so that the root's mount ends
with the last process of the node, however that process ends. It is told everything by ``run.json`` and
records itself and nspawn beside it. It ends when the node powers off, is cut off, or on SIGTERM.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from deploy.lab import cgroups, processes
from deploy.lab.errors import LabError
from deploy.lab.files import read_json, write_json
from deploy.lab.network import remove_link

REBOOTED = 133
"""nspawn's exit code for "the container rebooted" under ``--keep-unit``."""
STOP_SECONDS = 10.0
OWN_MARK = "lockstep lab: "
"""Begins the supervisor's own lines in console.log."""


class Stop(Exception):
    """SIGTERM came."""


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stop


def overlay_argv(lower: str, upper: str, work: str, root: str) -> list[str]:
    """The mount command of a node's root."""
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    return ["mount", "-t", "overlay", "-o", options, "lockstep-lab", root]


def mount_root(settings: dict[str, Any]) -> None:
    """Mount the node's overlay. Raises LabError."""
    argv = overlay_argv(*(settings[name] for name in ("lower", "upper", "work", "root")))
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise LabError(f"cannot mount the node's root: {done.stderr.strip()}")


def stop_container(nspawn: subprocess.Popen[bytes], upper: str) -> None:
    """Kill the container's init and wait for nspawn; nspawn itself is killed only if it then hangs."""
    waited = 0.0
    while nspawn.poll() is None:
        init = processes.inits().get(upper)
        if init is not None:
            processes.kill(init)
        if waited > STOP_SECONDS:
            nspawn.kill()
        try:
            nspawn.wait(0.05)
        except subprocess.TimeoutExpired:
            waited += 0.05


def keep(directory: Path, settings: dict[str, Any]) -> int:
    """Run the node until it is off; returns nspawn's last exit code."""
    code = REBOOTED
    nspawn: subprocess.Popen[bytes] | None = None
    try:
        while code == REBOOTED:
            remove_link(settings["link"])
            nspawn = subprocess.Popen(
                settings["argv"],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **settings["environment"]},
            )
            found = processes.identify(nspawn.pid)
            write_json(directory / "nspawn.json", found.as_json() if found else None)
            code = nspawn.wait()
            print(f"{OWN_MARK}the container ended with exit code {code}", flush=True)
    except Stop:
        if nspawn is not None:
            stop_container(nspawn, settings["upper"])
    finally:
        orphan = processes.inits().get(settings["upper"])
        if orphan is not None:
            processes.kill(orphan)
            processes.wait_gone([orphan], STOP_SECONDS)
    return code


def keep_container(directory: Path, settings: dict[str, Any]) -> None:
    """Mount the node's root and run it. Raises LabError, OSError."""
    if settings["cgroup"]:
        cgroups.enter(settings["cgroup"])
    mount_root(settings)
    try:
        keep(directory, settings)
    finally:
        (directory / "nspawn.json").unlink(missing_ok=True)


def supervise(run_file: Path, keep: Callable[[Path, dict[str, Any]], object]) -> int:
    """Be the one supervisor of a node, with a record of it, while ``keep`` runs the node; the exit code.

    keep: gets the node's directory and the content of the run file.
    """
    directory = run_file.parent
    lock = os.open(directory / "supervisor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{OWN_MARK}cannot run twice: this node has a supervisor", file=sys.stderr)
        return 3
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = read_json(run_file)
    own = processes.identify(os.getpid())
    write_json(directory / "supervisor.json", own.as_json() if own else None)
    try:
        keep(directory, settings)
    except Stop:
        pass
    except (LabError, OSError) as error:
        print(f"{OWN_MARK}{error}", flush=True)
        return 1
    finally:
        remove_link(settings["link"])
        (directory / "supervisor.json").unlink(missing_ok=True)
    return 0


def main(argv: list[str]) -> int:
    """``python -m deploy.lab.supervisor NODE_DIRECTORY/run.json``."""
    return supervise(Path(argv[0]), keep_container)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
