"""Running other programs for the lab: argv lists only, no terminal, an error that is one sentence."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.lab.errors import LabError

BOUND = (
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--propagation", "private"),
    *("--pid", "--mount-proc", "--fork", "--kill-child", "--"),
)
"""Prefix of a build: it and all that it starts end with the lab command that started it, however that ends,
and its mounts are never seen outside."""


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's variables with a plain locale and a PATH that has the system's tools; None removes one."""
    result = dict(os.environ)
    result["LC_ALL"] = "C.UTF-8"
    result["PATH"] = os.pathsep.join([result.get("PATH") or "/usr/bin:/bin", "/usr/sbin", "/sbin"])
    for name, value in (changes or {}).items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def run(argv: Sequence[str], *, text: str | None = None, check: bool = True) -> str:
    """Run a short command and return its standard output.

    Raises LabError with the command and its last error line when it fails and ``check`` is true.
    """
    done = subprocess.run(
        argv,
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        env=environment(),
    )
    if check and done.returncode != 0:
        raise LabError(f"`{' '.join(argv)}` failed: {last_line(done.stderr, done.returncode)}")
    return done.stdout


def run_logged(
    argv: Sequence[str],
    log: Path,
    what: str,
    *,
    changes: Mapping[str, str | None] | None = None,
) -> None:
    """Run a build command, whose output goes to a log file and which does not outlive its caller.

    Raises LabError, naming what failed, the last telling line and the log, when it fails.
    """
    with log.open("ab") as stream:
        begin = stream.tell()
        done = subprocess.run(
            [*BOUND, *argv],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(changes),
        )
    if done.returncode != 0:
        with log.open("rb") as written:
            written.seek(begin)
            output = written.read().decode(errors="replace")
        raise LabError(f"{what} failed: {last_line(output, done.returncode)} (all of it: {log})")


def last_line(output: str, code: int) -> str:
    """The line of a failed command's output that says why: its last error line, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = [
        line for line in lines if line.startswith(("E:", "ERROR", "Error", "error", "mount:"))
    ]
    return (marked or lines or [f"exit code {code}"])[-1]
