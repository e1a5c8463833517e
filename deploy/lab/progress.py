"""Progress lines with the seconds since the command began; safe to call from several threads."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO


class Progress:
    """Prints one line an event: ``[  3.2 s] base image: building``."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._began = time.monotonic()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.monotonic() - self._began

    def __call__(self, text: str) -> None:
        with self._lock:
            print(f"[{self.seconds:6.1f} s] {text}", file=self._stream, flush=True)
