"""Checkpoints of a run: where they are, which is whole, and which go.

A checkpoint is a directory ``checkpoints/step-00000020`` on shared storage with DeepSpeed's files
and ours; it counts only with a ``COMPLETE`` marker, which is written when every rank's files are
on the disk and which lists them with their sizes. What is in DeepSpeed's files is its affair.
Imports without torch; the two functions that need it say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import TrainerError
from trainer.files import reading, sync_directory, write_json

MARKER = "COMPLETE"
STATE = "state.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Complete:
    """One whole checkpoint.

    world_size: the ranks that wrote it, which must be as many as read it.
    """

    directory: Path
    step: int
    world_size: int
    fingerprint: str

    def state(self) -> dict[str, Any]:
        """What the loop saved besides DeepSpeed's files."""
        content: dict[str, Any] = json.loads((self.directory / STATE).read_text(encoding="utf-8"))
        return content


def root(run: Path) -> Path:
    """The directory of all checkpoints of a run."""
    return run / "checkpoints"


def name(step: int) -> str:
    """The directory's name for a step."""
    return f"step-{step:08d}"


def complete(run: Path) -> list[Complete]:
    """All whole checkpoints, newest first. Raises TrainerError if one cannot be read."""
    found = [_read(directory) for directory in _directories(run)]
    return sorted((one for one in found if one), key=lambda one: one.step, reverse=True)


def latest(run: Path) -> Complete | None:
    """The whole checkpoint that a resumed run begins from."""
    return next(iter(complete(run)), None)


def _directories(run: Path) -> list[Path]:
    found: list[Path] = []
    with reading(root(run)), contextlib.suppress(FileNotFoundError):
        found = [path for path in root(run).iterdir() if NAME.fullmatch(path.name)]
    return [path for path in found if path.is_dir()]


def _read(directory: Path) -> Complete | None:
    """The checkpoint if its marker is there and every listed file is as long as it was.

    Raises TrainerError where that cannot be seen: a whole one on storage that stalls is not half.
    """
    damaged = (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError)
    found, whole = None, False
    with reading(directory), contextlib.suppress(*damaged):
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        files: dict[str, int] = marker["files"]
        whole = all((directory / file).stat().st_size == size for file, size in files.items())
        found = Complete(
            directory=directory,
            step=int(marker["step"]),
            world_size=int(marker["world_size"]),
            fingerprint=str(marker["config_fingerprint"]),
        )
    return found if found and whole and directory.name == name(found.step) else None


# --- for rank 0 ------------------------------------------------------------------------------


def clear_half(run: Path) -> None:
    """Remove what an interrupted save left, before the next save begins."""
    for directory in _directories(run):
        if _read(directory) is None:
            _remove(directory)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` whole checkpoints."""
    for old in complete(run)[keep:]:
        _remove(old.directory)


def _remove(directory: Path) -> None:
    # Without its marker first, a half-removed one would be taken for whole.
    (directory / MARKER).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def mark(directory: Path, step: int, world_size: int, config: Config) -> None:
    """Declare a checkpoint whole; all ranks' files must be on the disk."""
    files = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }
    write_json(
        directory / MARKER,
        {
            "step": step,
            "world_size": world_size,
            "config_fingerprint": config.fingerprint(),
            "files": files,
            "time": time.time(),
        },
    )
    sync_directory(directory.parent)


def refusal(
    found: Complete, state: Mapping[str, Any], config: Config, world_size: int, corpus_digest: str
) -> str | None:
    """Why this checkpoint cannot be resumed by this job, as a sentence; None if it can."""
    if found.world_size != world_size:
        return (
            f"{found.directory} was written by {found.world_size} ranks and this job has "
            f"{world_size}: start it with {found.world_size} ranks, or give it a new output"
        )
    if found.fingerprint != config.fingerprint():
        before, now = state["config"], config.decisive()
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        shown = ", ".join(f"{key} (was {json.dumps(before.get(key))})" for key in changed[:3])
        return (
            f"{found.directory} was made with another config: {shown}; set that back, or give the "
            "job a new output"
        )
    if state["corpus"] != corpus_digest:
        return (
            f"{found.directory} was made from other text: data.files or data.tokenizer changed; put the "
            "files back, or give the job a new output"
        )
    return None


# --- for every rank --------------------------------------------------------------------------


def save_random_state(directory: Path, rank: int) -> None:
    """Write this rank's generators (needs torch): dropout goes on where it was."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, directory / f"random-{rank:05d}.pt")


def load_random_state(directory: Path, rank: int) -> None:
    """Restore this rank's generators (needs torch). Raises TrainerError if the file is not there."""
    import torch

    path = directory / f"random-{rank:05d}.pt"
    if not path.is_file():
        raise TrainerError(
            f"{path} is not visible on {os.uname().nodename}: output must be on storage that all "
            "nodes share"
        )
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
