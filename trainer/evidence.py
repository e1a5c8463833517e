"""What one rank leaves behind for whoever looks for the first cause: its log and its error record.

With LOCKSTEP_ATTEMPT_DIR set, stdout and stderr go to ``rank-00000.log`` there, and an exception
to ``rank-00000.error.json``. This module decides whether a rank names itself as the cause; it
neither diagnoses nor advises. It imports without torch, because it must run before torch does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import PeerError, StoppedError, TrainerError
from trainer.files import write_json, writing

Kind = Literal["own", "peer", "stopped"]
"""own: this rank failed · peer: it lost another one · stopped: it was told to end."""

OWN = [
    # Network words of failures that are local all the same: they must be seen before PEER.
    r"EADDRINUSE|[Aa]ddress already in use|server socket has failed to (listen|bind)",
    r"Unable to find address for",
    r"No space left on device|Disk quota exceeded|Too many open files",
    r"out of memory|OutOfMemoryError|can't allocate memory",
    r"TimeoutExpired",
    r"shared memory segment|failed to extend \S*/dev/shm",
    r"HTTPS?ConnectionPool|MaxRetryError|ReadTimeoutError|couldn't connect to 'http",
    # A file that cannot be read is this node's storage, whatever the errno says.
    r"\[Errno \d+\] [^:]*: ['\"]/",
    # A name that this node cannot resolve, an interface that it does not have.
    r"name resolution|Name or service not known|no socket interface found",
]
PEER = [
    r"Connection (was )?(reset|closed|aborted) by (remote )?peer",
    r"Connection closed by remote peer|ncclRemoteError|remote process exited",
    r"Broken pipe",
    r"connectFullMesh failed",
    r"gloo/transport/\S+:\d+\]",
    r"timed? ?out",
    r"DistNetworkError|DistStoreError",
    r"got 0 bytes|Connection was likely closed",
    r"c10d key-value store by key|store->get\(|TCPStore",
    r"(client socket|TCP client) (has )?failed to connect",
    r"Connection refused|No route to host|Socket Timeout",
    r"RendezvousConnectionError|RendezvousTimeoutError|RendezvousClosedError",
    r"Watchdog caught collective operation|Some NCCL operations have failed",
]
_OWN = re.compile("|".join(OWN))
_PEER = re.compile("|".join(PEER), re.IGNORECASE)


def classify(error_text: str) -> Literal["own", "peer"]:
    """Whether an error's type and message tell of a lost peer or of this rank itself.

    Fit for one error, not for a whole log: libraries print network warnings that mean nothing.
    """
    if _OWN.search(error_text):
        return "own"
    return "peer" if _PEER.search(error_text) else "own"


def kind_of(error: BaseException) -> Kind:
    """The kind of an exception, judged by the first one of its chain.

    A failure often raises others while it is cleaned up (a barrier that nobody comes to), and
    those would turn an own failure into a peer's.
    """
    if isinstance(error, (StoppedError, KeyboardInterrupt)):
        return "stopped"
    first = error
    for link in _chain(error):
        # What code catches as part of its normal flow is no cause of anything.
        if not isinstance(link, (KeyError, AttributeError, ImportError, StopIteration)):
            first = link
    if isinstance(first, StoppedError):
        return "stopped"
    if isinstance(first, PeerError):
        return "peer"
    if isinstance(first, TrainerError):
        return "own"
    return classify(f"{type(first).__name__}: {first}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those before it, last first.

    What a TrainerError was raised ``from`` is left out: our sentence knows better than its words.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    explained = False
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if not explained:
            yield link
        if link.__cause__ is not None:
            explained = explained or isinstance(link, TrainerError)
            link = link.__cause__
        else:
            explained = False
            link = None if link.__suppress_context__ else link.__context__


def one_line(error: BaseException) -> str:
    """Type and message of an exception on one line of at most 1000 characters."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    named = isinstance(error, TrainerError) and message
    return (message if named else f"{type(error).__name__}: {message}".rstrip(": "))[:1000]


@dataclass(frozen=True)
class Evidence:
    """Where this rank's log and error record go; ``directory`` is None when nobody asked."""

    directory: Path | None
    rank: int

    @property
    def log(self) -> Path | None:
        """The file that holds this rank's stdout and stderr."""
        return self.directory / f"rank-{self.rank:05d}.log" if self.directory else None

    @property
    def error(self) -> Path | None:
        """The file that names how this rank failed; absent unless it did."""
        return self.directory / f"rank-{self.rank:05d}.error.json" if self.directory else None

    def begin(self) -> None:
        """Redirect stdout and stderr, drop a stale record, dump stacks on a crash or SIGUSR1.

        SIGUSR1 prints the stacks of all threads into the log, which tells where a rank hangs.
        Raises TrainerError if the log cannot be written.
        """
        if self.log is not None and self.error is not None:
            with writing(self.log):
                self.log.parent.mkdir(parents=True, exist_ok=True)
                self.error.unlink(missing_ok=True)
                target = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.close(target)
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)

    def record(self, error: BaseException) -> Kind:
        """Write the error record, once and atomically; returns the kind."""
        kind = kind_of(error)
        if self.error is not None and not self.error.exists():
            content = {
                "kind": kind,
                "host": socket.gethostname(),
                "rank": self.rank,
                "error": one_line(error),
                "traceback": "".join(traceback.format_exception(error)),
                "time": time.time(),
            }
            # A full disk may be the very failure; then the log alone must do.
            with contextlib.suppress(OSError):
                write_json(self.error, content)
        return kind


def from_environment(environ: Mapping[str, str]) -> Evidence:
    """The evidence that the launcher asked for."""
    directory = environ.get("LOCKSTEP_ATTEMPT_DIR")
    rank = environ.get("RANK", "0")
    return Evidence(
        directory=Path(directory).absolute() if directory else None,
        rank=int(rank) if rank.isdigit() else 0,
    )
