"""Runs a program on the control machine for a node: what must be had before it can travel there."""

from __future__ import annotations

import subprocess
import tempfile

from pyinfra.api.host import Host

from roles.core import session
from roles.core.steps import Here


def run_here(node: Host, step: Here) -> None:
    """Carry a Here out, while other nodes go on. Raises NodeFailed."""
    name = step.command[0]
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            with subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        session.say(node, line.rstrip())
                except BaseException:
                    process.terminate()
                    raise
        except OSError as error:
            raise session.NodeFailed(f"{name} cannot be run here: {error.strerror}") from None
        if process.returncode:
            complaints.seek(0)
            lines = [line.strip() for line in complaints if line.strip()]
            reason = lines[-1] if lines else f"{name} ended with status {process.returncode} here"
            raise session.NodeFailed(reason)
