"""SIGTERM as a request: ends a process that only waits at once, and a training at a step's end.

It decides for this process alone; that all ranks stop at the same step is agreed by the loop.
"""

from __future__ import annotations

import signal
from types import FrameType

from trainer.errors import StoppedError


class StopRequest:
    """Whether this process was told to end.

    While ``at_step_end`` is False the signal raises StoppedError where it finds the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.at_step_end = False

    def listen(self) -> None:
        """Take over SIGTERM. Must be called from the main thread."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A service manager signals the launcher and its children, and the launcher its children
        # again: only the first signal counts.
        first, self.requested = not self.requested, True
        if first and not self.at_step_end:
            raise StoppedError("stopped by SIGTERM; no step was running")
