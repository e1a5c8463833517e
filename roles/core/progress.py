"""Says now and then how far a transfer is."""

from __future__ import annotations

import sys
import time

from pyinfra.api.host import Host

from roles.core import session

MB = 1_000_000


class Progress:
    """How far something is that arrives; its clock runs from the first figure. size: bytes in all."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._began: float | None = None
        self._first = 0
        self._said = 0.0

    def note(self, node: Host, at: int) -> None:
        """So many bytes are there, as is said of this node now and then."""
        now = time.monotonic()
        if self._began is None:
            self._first, self._began, self._said = at, now, now
        if now - self._said < interval():
            return
        self._said = now
        line = progress(self._name, max(self._size, at), at, self._first, now - self._began)
        session.say(node, line)


def interval() -> int:
    """Seconds from one line about progress to the next."""
    return 3 if sys.stderr.isatty() else 10


def progress(name: str, size: int, at: int, first: int, seconds: float) -> str:
    """One line: how much of a file, or of many, is there, how fast it comes, how long the rest takes.

    size, at, first: bytes in all, now, and when the clock began to run. seconds: since then.
    """
    size = max(size, 1)
    speed = max(at - first, 0) / seconds
    left = f"{round((size - at) / speed)} s left" if speed else "standing still"
    return (
        f"{name}: {at // MB} of {size // MB} MB ({100 * at // size} %), "
        f"{speed / MB:.1f} MB/s, {left}"
    )
