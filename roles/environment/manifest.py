"""The files of an environment: what each holds, which changed since they were read, and whose they are.

Sent to the nodes with the proof: the standard library alone, from Python 3.8 on. Nothing is written here
but the list of files. Times decide only what is read again; they are never part of what is compared.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import TypeAlias

NAME = ".lockstep-files.json"
NOBODY = "no distribution"
LEFT_OUT = re.compile(
    r"var"  # what programs write while they run, such as fontconfig's cache
    r"|\.lockstep-[^/]*"  # records of the environment itself
    r"|lib/python3[^/]*/site-packages/(trainer|lockstep_trainer-[^/]*|\.lockstep-[^/]*)"
)
"""Paths that are not compared; the trainer has a role of its own, which looks at its files."""
AT_EVERY_START = re.compile(r"lib/python3[^/]*/site-packages/([^/]*\.pth|(site|user)customize\.py)")
"""What every Python reads when it starts: one that was added changes whatever runs there."""
CHUNK = 1 << 20
WORKERS = 16
BATCH_FILES, BATCH_BYTES = 64, 4 << 20


class File(NamedTuple):
    """content: a letter (f a file, x one that can be run, l a link) and the SHA-256 in hex, or where the
    link leads; or "!" and why it cannot be read. seen: change time, size and inode when it was read."""

    content: str
    seen: str


Files: TypeAlias = "dict[str, File]"
"""By the path below the prefix."""


def read(prefix: Path, known: Mapping[str, File]) -> Files:
    """All files with their content. One that is still as ``known`` saw it is not read again.

    The change time is set by the kernel alone, so an edit is found whatever it does to the modification
    time. With an empty ``known`` every byte is read: that also finds a disk that gives others than it took.
    """
    found: Files = {}
    unread: dict[tuple[int, int], list[_Unread]] = {}
    for path, status in _walk(str(prefix), ""):
        seen = f"{status.st_ctime_ns} {status.st_size} {status.st_ino}"
        before = known.get(path)
        if stat.S_ISLNK(status.st_mode):
            found[path] = File("l" + os.readlink(prefix / path), "")  # noqa: PTH115 - 3.9
        elif not stat.S_ISREG(status.st_mode):
            found[path] = File("!no file", "")
        elif before is not None and before.seen == seen:
            found[path] = before
        else:
            kind = "x" if status.st_mode & stat.S_IXUSR else "f"
            names = unread.setdefault((status.st_dev, status.st_ino), [])
            names.append(_Unread(path, kind, seen, status.st_size))
    # The biggest first, so that none of them is left alone at the end.
    order = sorted(unread.values(), key=lambda names: -names[0].size)
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        for hashed in pool.map(lambda batch: _contents(prefix, batch), _batches(order)):
            found.update(hashed)
    return found


class _Unread(NamedTuple):
    path: str
    kind: str
    seen: str
    size: int


def _walk(root: str, below: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(f"{root}/{below}") as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            # Byte code is made again by every Python that may write it.
            if entry.name == "__pycache__" or LEFT_OUT.fullmatch(path):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(root, path)
            else:
                with suppress(FileNotFoundError):  # it went meanwhile
                    yield path, entry.stat(follow_symlinks=False)


def _batches(order: Iterable[list[_Unread]]) -> Iterator[list[list[_Unread]]]:
    batch, size = [], 0
    for names in order:
        batch.append(names)
        size += names[0].size
        if len(batch) >= BATCH_FILES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _contents(prefix: Path, batch: list[list[_Unread]]) -> Files:
    found: Files = {}
    for names in batch:
        digest = _sha256(prefix / names[0].path)
        for name in names:
            content = digest if digest.startswith("!") else name.kind + digest
            found[name.path] = File(content, name.seen)
    return found


def _sha256(path: Path) -> str:
    """In hex; or "!" and the reason, as of a disk that cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        return f"!{error.strerror}"
    return digest.hexdigest()


def digest(files: Mapping[str, File]) -> str:
    """The hash of an environment: over its files' paths and contents. Names and versions of its
    distributions are among them, in their metadata."""
    lines = sorted(f"{path}\0{file.content}\n" for path, file in files.items())
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def without_added(prefix: Path, before: Mapping[str, File], now: Files, installed: bool) -> Files:
    """The files that count: those of ``before``, and what runs at every start. What programs add while they
    run (caches, locks, tables) is no damage and no difference between nodes.

    installed: distributions came or went since; then what a record names counts too.
    """
    recorded = owners(prefix) if installed else {}
    return {
        path: file
        for path, file in now.items()
        if path in before or path in recorded or AT_EVERY_START.fullmatch(path)
    }


def load(prefix: Path) -> Files:
    """The files as they were last read; empty where no such list lies."""
    try:
        found = json.loads((prefix / NAME).read_text())
        return {path: File(*values) for path, values in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(prefix: Path, files: Mapping[str, File]) -> None:
    """Keep the list, at once or not at all."""
    fresh = prefix / f"{NAME}.new"
    fresh.write_text(json.dumps(files))
    fresh.replace(prefix / NAME)


def differences(before: Mapping[str, File], now: Mapping[str, File]) -> dict[str, str]:
    """Path to what happened to it: altered, missing, added, or why it cannot be read."""
    found = dict.fromkeys(before.keys() - now.keys(), "missing")
    found.update(dict.fromkeys(now.keys() - before.keys(), "added"))
    for path in before.keys() & now.keys():
        content = now[path].content
        if content != before[path].content:
            found[path] = content[1:] if content.startswith("!") else "altered"
    return found


def owners(prefix: Path) -> dict[str, str]:
    """Path to the distribution that it belongs to, as ``torch 2.6.0``, by pip's and conda's own records.

    A file that both claim is pip's: conda lists what pip finds again in the distribution's metadata.
    """
    found: dict[str, str] = {}
    for record in sorted((prefix / "conda-meta").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            values = json.loads(record.read_text())
            owner = f"{values['name']} {values['version']}"
            found.update(dict.fromkeys([*values["files"], f"conda-meta/{record.name}"], owner))
    for folder in sorted(prefix.glob("lib/python3*/site-packages/*.dist-info")):
        name, _, version = folder.name[: -len(".dist-info")].partition("-")
        site = folder.parent.relative_to(prefix)
        owner = f"{name} {version}"
        with suppress(OSError, ValueError, csv.Error):
            text = (folder / "RECORD").read_text(encoding="utf-8")
            paths = [row[0] for row in csv.reader(text.splitlines()) if row]
            found.update((os.path.normpath(site / path), owner) for path in paths)
    return found


def sentence(prefix: Path, changes: Mapping[str, str]) -> str:
    """What changed, by distribution: the first file of each, and how many more."""
    known = owners(prefix)
    groups: dict[str, list[str]] = {}
    for path in sorted(changes):
        groups.setdefault(known.get(path, NOBODY), []).append(path)
    parts = []
    for owner, paths in sorted(groups.items(), key=lambda group: group[0] == NOBODY)[:5]:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        parts.append(f"{owner}: {paths[0]} {changes[paths[0]]}{more}")
    more = f"; and files of {len(groups) - 5} more distributions" if len(groups) > 5 else ""
    return f"{'; '.join(parts)}{more}, in {prefix}".encode(errors="replace").decode()
