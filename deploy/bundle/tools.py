"""Runs apt-get, dnf and pip for the bundle; of a failure the cause is told, not the last word."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from deploy.bundle.store import BundleError
from deploy.lab.commands import environment, last_line


def run(what: str, argv: Sequence[str], **variables: str) -> str:
    """What it prints. what: begins the sentence of a BundleError, which it raises when the tool fails."""
    changes: Mapping[str, str | None] = variables
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(changes),
    )
    if done.returncode:
        raise BundleError(f"{what}: {reason(done.stderr or done.stdout, done.returncode)}")
    return done.stdout


def reason(said: str, code: int) -> str:
    """The line that tells why; of dnf, which gives a list below ``Error:``, the first of its problems."""
    lines = [line.strip().removeprefix("- ") for line in said.splitlines() if line.strip()]
    problem = next((n for n, line in enumerate(lines) if line.startswith("Problem")), None)
    if problem is None:
        return last_line(said, code)
    rest = lines[problem + 1 :]
    whole = next((n for n, line in enumerate(rest) if line.startswith("Problem")), len(rest))
    told = [line for line in rest[:whole] if line != "conflicting requests"]
    first = lines[problem].partition(": ")[2]
    return "; ".join(dict.fromkeys([*([first] if first != "conflicting requests" else []), *told]))
