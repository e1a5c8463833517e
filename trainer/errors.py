"""The failures that a user reads as one sentence; everything else is a bug and keeps its traceback."""

from __future__ import annotations


class TrainerError(Exception):
    """One sentence: what is wrong, where, what to do. It ends this process with ``exit_code``."""

    exit_code = 1


class PeerError(TrainerError):
    """Another rank failed or went silent; this rank is not the cause and must not claim it."""


class StoppedError(TrainerError):
    """SIGTERM arrived: an orderly end from outside, not a failure of the training."""

    exit_code = 143


def reason(error: OSError) -> str:
    """What the system says about a file operation that failed, as the end of a sentence."""
    return (error.strerror or str(error)).lower()
