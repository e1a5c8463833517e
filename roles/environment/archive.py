"""What an archive on the control machine holds: read once, then remembered by path, size and time.

Nothing is unpacked here. The one pass over the whole archive also finds a damaged one before it travels.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from gevent.lock import RLock

from inventory.settings import state_directory
from roles.environment.fit import Needs, newest
from roles.environment.listing import Listing, hashes
from roles.environment.members import Refused
from roles.environment.tar import CHUNK, Members, decompressed, ending_of


class ArchiveProblem(Exception):
    """The archive cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Archive:
    """An environment's archive.

    unpacked: bytes of what it holds, in blocks of a disk. entries: its members.
    ending: tar, tar.gz, tar.bz2, tar.xz or tar.zst, by content and not by name.
    root: the environment's folder inside, spelt as in the archive; empty when it is the top.
    python: version of the interpreter, major.minor.
    interpreter: below the root, what can run before the environment is mended.
    home: the node's own interpreter that a venv borrows; None when the environment has its own.
    distributions: names of the metadata folders in site-packages that own their files, or are to.
    strays: metadata folders whose files another distribution has replaced; they are not unpacked.
    overwritten: those of them that are required; their distributions must be installed again.
    unclear: metadata folders that claim the same files, where neither record holds: ``A and B``.
    requires: metadata folder to what its distribution requires, as ``Requires-Dist`` spells it.
    editables: normal name of each editable install to its source, a folder outside the environment.
    needs: the machine and the glibc without which no training can run.
    imports: top-level module to the newer glibc without which it cannot be imported.
    """

    sha256: str
    unpacked: int
    ending: str
    root: str
    python: str
    interpreter: str
    home: str | None
    distributions: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()
    requires: Mapping[str, list[str]] = field(default_factory=dict)
    editables: Mapping[str, str] = field(default_factory=dict)
    entries: int = 0
    needs: Needs = field(default_factory=Needs)
    imports: Mapping[str, Needs] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Named by content, so that a file of this name is this archive."""
        return f"{self.sha256}.{self.ending}"

    def needs_of(self, modules: Iterable[str]) -> Needs:
        """What it needs where these are imported."""
        tops = (name.partition(".")[0] for name in modules)
        return newest([self.needs, *(self.imports[top] for top in tops if top in self.imports)])


TUPLES = ("distributions", "strays", "overwritten", "unclear")
"""Fields that are lists in the memory."""

_lock = RLock()
"""pyinfra asks for several nodes at once; a lock of ``threading`` would stop all its greenlets for ever."""

Identity = tuple[Path, int, int]
"""Path, size in bytes, and time of the last change in nanoseconds."""

_known: dict[Identity, Archive | ArchiveProblem] = {}
"""What was found in this run: every role and node asks, and the memory on the disk is long."""


def describe(path: Path, called: str = "") -> Archive:
    """What is in the archive. Raises ArchiveProblem, about what it is ``called``, or else the path.

    A file that is gone but was read before is described from memory: nodes that already have its
    environment need no archive.
    """
    with _lock:
        try:
            status = path.stat()
        except FileNotFoundError:
            if known := recalled(str(path)):
                return known[1]
            raise ArchiveProblem(f"there is no archive {path} on this machine") from None
        except OSError as error:
            raise ArchiveProblem(f"{path} cannot be read: {error.strerror}") from None
        identity = (path, status.st_size, status.st_mtime_ns)
        if identity not in _known:
            try:
                _known[identity] = _at_hand(identity, called)
            except ArchiveProblem as problem:
                _known[identity] = problem
        answer = _known[identity]
    if isinstance(answer, ArchiveProblem):
        raise answer
    return answer


def _at_hand(identity: Identity, called: str) -> Archive:
    """From the memory, or else read now and remembered. Raises ArchiveProblem."""
    path, *rest = identity
    known = recalled(str(path))
    if known and known[0] == rest:
        return known[1]
    found = read(path, called)
    remember(str(path), rest, found)
    return found


def recalled(name: str) -> tuple[object, Archive] | None:
    """(identity, what is in it) of an archive as it was last read; None where it never was.

    name: its path, or what else it was remembered by.
    """
    record = _remembered(_memory()).get(name)
    return (record["identity"], _archive(record)) if record else None


def remember(name: str, identity: object, archive: Archive) -> None:
    """Keep what was read, for this run and later ones. Raises ArchiveProblem where that cannot be written."""
    memory = _memory()
    known = {**_remembered(memory), name: {"identity": identity, **asdict(archive)}}
    fresh = memory.with_name(f"{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(known, indent=1))
        fresh.replace(memory)
    except OSError as error:
        raise ArchiveProblem(f"{memory} cannot be written: {error.strerror}") from None


def _memory() -> Path:
    return state_directory() / "archives.json"


def _remembered(memory: Path) -> Mapping[str, Any]:
    try:
        status = memory.stat()
    except OSError:
        return {}
    return _parsed(memory, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _parsed(memory: Path, inode: int, mtime_ns: int) -> Mapping[str, Any]:
    """The file as it is since that time: every role and node asks."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    names = {field.name for field in fields(Archive)} | {"identity"}
    if not isinstance(known, dict):
        return {}
    return {
        path: record
        for path, record in known.items()
        if isinstance(record, dict) and set(record) == names
    }


def _archive(record: Mapping[str, Any]) -> Archive:
    values = {key: value for key, value in record.items() if key != "identity"}
    lists = {name: tuple(values[name]) for name in TUPLES}
    needs = Needs(**values["needs"])
    imports = {module: Needs(**each) for module, each in values["imports"].items()}
    return Archive(**{**values, **lists, "needs": needs, "imports": imports})


def read(path: Path, called: str = "") -> Archive:
    """Read the archive from its first byte to its last. Raises ArchiveProblem, as ``describe`` does."""
    found = Listing()
    try:
        if not path.is_file():
            raise Refused("is not a file")
        before = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            start = file.read(6)
            digest.update(start)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        ending = ending_of(start)
        with decompressed(path, ending) as stream:
            members = Members(stream)
            for member in members:
                found.add(members, member, before.st_size)
            members.end()
        listed = found.listed()
        if (files := found.doubtful(listed)) is not None:
            with decompressed(path, ending) as stream:
                listed = found.judged(listed, hashes(Members(stream), listed.root, files))
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise Refused("changed while it was read: wait until it is written, and run again")
    except Refused as refused:
        raise ArchiveProblem(f"{called or path} {refused}") from None
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        kind = "is damaged or cut short" if found.entries else "is no tar archive of an environment"
        if isinstance(error, OSError):
            kind = "cannot be read"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ArchiveProblem(f"{called or path} {kind} ({reason})") from None
    return Archive(sha256=digest.hexdigest(), ending=ending, **vars(listed))
