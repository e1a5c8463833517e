"""Processes by evidence: a pid counts only with its start time and the host's boot id.

A recorded pid may belong to somebody else by the time it is read. So nothing here is found or
killed by name: a record must match the living process, and a node's init is recognised by the
overlay that it runs on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """One process. start: clock ticks from the host's boot to the start of the process."""

    pid: int
    start: int
    boot: str

    def as_json(self) -> dict[str, int | str]:
        return {"pid": self.pid, "start": self.start, "boot": self.boot}


def from_json(value: Any) -> Process | None:
    """The process of a record, or None when the record is no whole one."""
    match value:
        case {"pid": int(pid), "start": int(start), "boot": str(boot)} if pid > 1:
            return Process(pid, start, boot)
    return None


def host_boot_id(proc: Path = PROC) -> str:
    return (proc / "sys/kernel/random/boot_id").read_text().strip()


def parse_stat(text: str) -> tuple[str, int]:
    """State letter and start time (clock ticks) of a /proc/PID/stat line; the name may hold anything."""
    fields = text[text.rindex(")") + 1 :].split()
    return fields[0], int(fields[19])


def identify(pid: int, proc: Path = PROC) -> Process | None:
    """The living process with that pid; None when there is none or it is a zombie."""
    try:
        state, start = parse_stat((proc / str(pid) / "stat").read_text())
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else Process(pid, start, host_boot_id(proc))


def alive(process: Process | None, proc: Path = PROC) -> bool:
    """True only when the process of the record itself still runs, not a later one with its pid."""
    return process is not None and identify(process.pid, proc) == process


def command_line(pid: int, proc: Path = PROC) -> list[str]:
    """argv of a process; empty when it is gone."""
    try:
        raw = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0") if part]


def verified(record: Any, argument: str, proc: Path = PROC) -> Process | None:
    """The process of a record, if it lives and has ``argument`` in its command line."""
    process = from_json(record)
    if process is None or not alive(process, proc):
        return None
    return process if argument in command_line(process.pid, proc) else None


def kill(process: Process, number: int = signal.SIGKILL) -> bool:
    """Signal exactly that process; False when it is gone already."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        if not alive(process):
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def wait_gone(processes: Iterable[Process], seconds: float) -> list[Process]:
    """Wait until the processes are gone, at most that long; returns those that are not."""
    left = list(processes)
    until = time.monotonic() + seconds
    while left := [process for process in left if alive(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return left


def parse_nspid(status: str) -> list[int]:
    """The pids of a process from the outermost namespace inwards, from /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return []


def root_upper(mountinfo: str) -> str | None:
    """The overlay's ``upperdir`` that a process has as its root, from /proc/PID/mountinfo."""
    for line in mountinfo.splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[4] != "/":
            continue
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind == "overlay":
            for option in options.split(","):
                name, _, value = option.partition("=")
                if name == "upperdir":
                    return value
    return None


def inits(proc: Path = PROC) -> dict[str, Process]:
    """Every container's init on this machine that has an overlay as its root: upperdir → process.

    Only pid 1 of a namespace directly below this one counts, so that a namespace made inside a node is
    not taken for the node.
    """
    depth = len(parse_nspid((proc / "self/status").read_text())) + 1
    found: dict[str, Process] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            pids = parse_nspid((entry / "status").read_text())
            if len(pids) != depth or pids[-1] != 1:
                continue
            upper = root_upper((entry / "mountinfo").read_text())
            process = identify(int(entry.name), proc)
            if upper is not None and process is not None:
                found[upper] = process
    return found
