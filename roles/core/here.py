"""Runs a program on the control machine for a node: what must be had before it can travel there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence

from roles.core import session


def run_here(command: Sequence[str], say: Callable[[str], None]) -> None:
    """Run it, while other nodes go on; what it prints is said. Raises NodeFailed with its last complaint."""
    name = command[0]
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            with subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                try:
                    for line in process.stdout:
                        say(line.rstrip())
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
