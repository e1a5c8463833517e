"""Files on shared storage that a reader sees whole or not at all, also after a power cut.

A failure to read or write becomes a sentence here; what is read or written is the callers' affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError, reason

FULL = re.compile(
    r"os error (28|122)|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+"
    r"|Error while serializing"
)
"""How torch, safetensors and tokenizers, which raise no OSError, tell of a write cut short."""


@contextlib.contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Raise TrainerError for a failure to write within; others pass. what: begins the sentence."""
    where = f"{what} cannot be written on {socket.gethostname()}"
    try:
        yield
    except OSError as error:
        raise TrainerError(f"{where}: {reason(error)}") from error
    except Exception as error:
        if not FULL.search(str(error)):
            raise
        raise TrainerError(f"{where}: no space left on device, or a quota is used up") from error


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Raise TrainerError for a failure to read within. what: begins the sentence."""
    try:
        yield
    except OSError as error:
        where = f"{what} cannot be read on {socket.gethostname()}"
        raise TrainerError(f"{where}: {reason(error)}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees all of it or none, also after a power cut."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its name and rename it into place, flushed to the disk."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries; file systems that cannot do it are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_files(directory: Path) -> None:
    """Flush to the disk what this node's ranks wrote into a directory; one call a node is enough."""
    for path in directory.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
