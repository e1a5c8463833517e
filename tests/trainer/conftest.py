"""The fixtures of ``trainer_runs``, for every test in this folder."""

from __future__ import annotations

from tests.trainer.trainer_runs import cache, job, text

__all__ = ["cache", "job", "text"]
