"""What an archive on the control machine holds: read once, then remembered by path, size and time.

Nothing is unpacked here. The one pass over the whole archive also finds a damaged one before it travels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from gevent.lock import RLock

from inventory.settings import state_directory
from roles.environment import mend, metadata

CHUNK = 1 << 20


class ArchiveProblem(Exception):
    """The archive cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Archive:
    """An environment's archive.

    size, unpacked: bytes, of the file and of what it holds.
    ending: tar, tar.gz, tar.bz2, tar.xz or tar.zst, by content and not by name.
    root: the environment's folder inside, spelt as in the archive; empty when it is the top.
    python: version of the interpreter, major.minor.
    interpreter: below the root, what can run before the environment is mended.
    home: the node's own interpreter that a venv borrows; None when the environment has its own.
    distributions: names of the metadata folders in site-packages that own their files.
    strays: metadata folders whose files another distribution has replaced; they are not unpacked.
    unclear: metadata folders that claim the same files, where neither record holds: ``A and B``.
    requires: metadata folder to what its distribution requires, as ``Requires-Dist`` spells it.
    editables: normal name of each editable install to its source, a folder outside the environment.
    """

    sha256: str
    size: int
    unpacked: int
    ending: str
    root: str
    python: str
    interpreter: str
    home: str | None
    distributions: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()
    unclear: tuple[str, ...] = ()
    requires: Mapping[str, list[str]] = field(default_factory=dict)
    editables: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Named by content, so that a file of this name is this archive."""
        return f"{self.sha256}.{self.ending}"


Mode = Literal["r|", "r|gz", "r|bz2", "r|xz"]

ENDINGS: dict[bytes, tuple[str, Mode]] = {
    b"\x28\xb5\x2f\xfd": ("tar.zst", "r|"),
    b"\x1f\x8b": ("tar.gz", "r|gz"),
    b"BZh": ("tar.bz2", "r|bz2"),
    b"\xfd7zXZ\x00": ("tar.xz", "r|xz"),
}
TOOLS = {"tar.zst": "zstd", "tar.gz": "gzip", "tar.bz2": "bzip2", "tar.xz": "xz"}
"""What a node needs to unpack it."""

_lock = RLock()
"""pyinfra asks for several nodes at once; a lock of ``threading`` would stop all its greenlets for ever."""

_refused: dict[tuple[Path, int, int], str] = {}
"""Archives that cannot be used, by path, size and time: every role and node asks for them in a run."""


def describe(path: Path) -> Archive:
    """What is in the archive. Raises ArchiveProblem.

    A file that is gone but was read before is described from memory: nodes that already have its
    environment need no archive.
    """
    memory = state_directory() / "archives.json"
    with _lock:
        known = _remembered(memory)
        record = known.get(str(path))
        try:
            status = path.stat()
        except FileNotFoundError:
            if record:
                return _archive(record)
            raise ArchiveProblem(f"there is no archive {path} on this machine") from None
        except OSError as error:
            raise ArchiveProblem(f"{path} cannot be read: {error.strerror}") from None
        identity = [status.st_size, status.st_mtime_ns]
        if record and record["identity"] == identity:
            return _archive(record)
        seen = (path, status.st_size, status.st_mtime_ns)
        if seen in _refused:
            raise ArchiveProblem(_refused[seen])
        try:
            found = read(path)
        except ArchiveProblem as problem:
            _refused[seen] = str(problem)
            raise
        known[str(path)] = {"identity": identity, **asdict(found)}
        memory.parent.mkdir(parents=True, exist_ok=True)
        fresh = memory.with_name(f"archives.json.{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1))
        fresh.replace(memory)
        return found


def _remembered(memory: Path) -> dict[str, Any]:
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


def _archive(record: dict[str, Any]) -> Archive:
    values = {key: value for key, value in record.items() if key != "identity"}
    lists = {name: tuple(values[name]) for name in ("distributions", "strays", "unclear")}
    return Archive(**{**values, **lists})


def read(path: Path) -> Archive:
    """Read the archive from its first byte to its last. Raises ArchiveProblem."""
    if not path.is_file():
        raise ArchiveProblem(f"{path} is not a file")
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        ending, mode = _kind(file.read(6))
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    found = _Listing()
    try:
        with _opened(path, ending) as stream, tarfile.open(fileobj=stream, mode=mode) as tar:
            for member in tar:
                found.add(tar, member)
    except (tarfile.ReadError, EOFError, zlib.error, LZMAError, OSError) as error:
        kind = "is damaged or cut short" if found.entries else "is no tar archive of an environment"
        raise ArchiveProblem(f"{path} {kind} ({error})") from None
    archive = found.archive(path, digest.hexdigest(), size, ending)
    groups = metadata.doubtful(archive.distributions)
    if not groups:
        return archive
    texts = found.texts[archive.root]
    listed = {
        file
        for group in groups
        for folder in group
        for file in metadata.recorded(texts.get(folder, {}).get("RECORD", ""))
    }
    with _opened(path, ending) as stream, tarfile.open(fileobj=stream, mode=mode) as tar:
        strays, unclear = metadata.judge(groups, texts, _hashes(tar, archive.root, listed))
    own = tuple(folder for folder in archive.distributions if folder not in strays)
    return replace(archive, distributions=own, strays=tuple(strays), unclear=tuple(unclear))


def _hashes(tar: tarfile.TarFile, root: str, listed: Collection[str]) -> dict[str, str]:
    """File in site-packages to its SHA-256 as RECORD spells it, for the listed files."""
    found = {}
    for member in tar:
        match = SITE.fullmatch(member.name)
        if not match or match["root"] != root or not match["entry"] or not member.isreg():
            continue
        file = "/".join(filter(None, (match["entry"], match["rest"])))
        if file in listed and (stream := tar.extractfile(member)):
            digest = hashlib.sha256()
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
            found[file] = metadata.spelt(digest.digest())
    return found


def _kind(start: bytes) -> tuple[str, Mode]:
    for magic, kind in ENDINGS.items():
        if start.startswith(magic):
            return kind
    return "tar", "r|"


@contextmanager
def _opened(path: Path, ending: str) -> Iterator[IO[bytes]]:
    """The archive's bytes; zst is unpacked by the zstd program, the others by tarfile itself."""
    if ending != "tar.zst":
        with path.open("rb") as file:
            yield file
        return
    program = shutil.which("zstd")
    if program is None:
        raise ArchiveProblem(
            f"{path} is compressed with zstd, which this machine lacks: install zstd"
        )
    with subprocess.Popen(
        [program, "-dcq", "--", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        yield process.stdout
        while process.stdout.read(CHUNK):  # what follows the end of the tar, up to the checksum
            pass
        complaint = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise OSError(complaint.split(" : ")[-1] or "zstd failed")


PYTHON_OF_BIN = re.compile(r"(?P<root>.*?)/?bin/(?P<name>python[0-9.]*)")
SITE = re.compile(
    r"(?P<root>.*?)/?lib/python(?P<version>[0-9]+\.[0-9]+)/site-packages(/(?P<entry>[^/]+)(/(?P<rest>.+))?)?"
)
SCRIPT = re.compile(r"(?P<root>.*?)/?bin/[^/]+")
MARK = re.compile(r"(?P<root>.*?)/?(pyvenv\.cfg|conda-meta/history)")


METADATA_BYTES = 16 << 20
"""More than the longest RECORD has: that of torch has about two."""


def _start(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes:
    """The first bytes of a regular file; none of anything else."""
    file = tar.extractfile(member) if member.isreg() else None
    return file.read(size) if file else b""


class _Listing:
    """What one pass over the members gathers."""

    def __init__(self) -> None:
        self.entries = 0
        self.unpacked = 0
        self.pythons: dict[str, dict[str, str]] = {}  # root -> name in bin -> link target, or empty
        self.versions: dict[str, str] = {}  # root -> major.minor
        self.metadata: dict[str, set[str]] = {}  # root -> metadata folders
        self.marks: dict[str, str] = {}  # root -> text of pyvenv.cfg, empty for conda
        self.texts: dict[str, dict[str, dict[str, str]]] = {}  # root -> metadata.Texts
        self.prefixes: dict[str, set[bytes]] = {}  # root -> where the environment has lived

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Note a member if it says something about the environment."""
        self.entries += 1
        self.unpacked += member.size
        name = member.name.rstrip("/")
        if match := PYTHON_OF_BIN.fullmatch(name):
            link = member.linkname if member.issym() else ""
            self.pythons.setdefault(match["root"], {})[match["name"]] = link
        elif match := SITE.fullmatch(name):
            self.versions.setdefault(match["root"], match["version"])
            entry = match["entry"] or ""
            if entry.endswith(metadata.ENDINGS):
                self.metadata.setdefault(match["root"], set()).add(entry)
            if metadata.is_told(entry, match["rest"] or ""):
                entries = self.texts.setdefault(match["root"], {})
                texts = entries.setdefault(entry, {})
                texts[match["rest"] or ""] = _start(tar, member, METADATA_BYTES).decode(
                    errors="replace"
                )
        elif match := MARK.fullmatch(name):
            text = b"" if name.endswith("history") else _start(tar, member, 65536)
            self.marks[match["root"]] = text.decode(errors="replace")
            self._lived(match["root"], mend.declared_prefixes(text, b""))
        elif match := SCRIPT.fullmatch(name):
            script = _start(tar, member, 65536)
            own = mend.interpreter_prefix(script)
            self._lived(match["root"], {own} if own else set())
            if name.endswith("/activate"):
                self._lived(match["root"], mend.declared_prefixes(b"", script))

    def _lived(self, root: str, prefixes: set[bytes]) -> None:
        self.prefixes.setdefault(root, set()).update(prefixes)

    def archive(self, path: Path, sha256: str, size: int, ending: str) -> Archive:
        """Put it together. Raises ArchiveProblem when it is not one environment."""
        root = self._root(path)
        names, version = self.pythons[root], self.versions[root]
        home, name = None, "python"
        for _ in range(8):
            link = names.get(name, "")
            if not link:
                break
            inside = PurePosixPath(link).name
            if link.startswith("/") and names.get(inside, "/").startswith("/"):
                home = link  # leads out of the environment: a venv's
                break
            name = inside
        settings = self.marks.get(root, "")
        folder = re.search(r"(?m)^home\s*=\s*(\S.*?)\s*$", settings)
        if folder and home is None:
            home = f"{folder[1]}/python{version}"  # a venv with a copied interpreter
        folders = tuple(sorted(self.metadata.get(root, ())))
        texts = self.texts.get(root, {})
        return Archive(
            sha256,
            size,
            self.unpacked,
            ending,
            root,
            version,
            f"bin/{name}",
            home,
            folders,
            requires=metadata.requirements(texts),
            editables=metadata.editables(texts, map(os.fsdecode, self.prefixes.get(root, ()))),
        )

    def _root(self, path: Path) -> str:
        roots = [root for root in self.pythons if root in self.versions]
        roots = [root for root in roots if root in self.marks] or roots
        if not roots:
            raise ArchiveProblem(
                f"{path} holds no Python environment: there is no bin/python in it"
            )
        outermost = min(roots, key=lambda root: len(PurePosixPath(root).parts))
        strangers = [
            root
            for root in roots
            if not PurePosixPath(root).is_relative_to(PurePosixPath(outermost))
        ]
        if strangers:
            raise ArchiveProblem(
                f"{path} holds several environments ({outermost}, {', '.join(strangers)}): pack one alone"
            )
        if "python" not in self.pythons[outermost]:
            raise ArchiveProblem(f"{path} has no bin/python in {outermost or 'it'}")
        return outermost
