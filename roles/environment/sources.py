"""Where an environment's archive comes from: it is declared, or made here from a directory or a list of packages.

What is made lies in the state directory, named by what it was made from, and is made again only when that changes.
What lies on the shared storage, and cannot be seen from here, the role ``archives`` has read by way of the head.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gevent.lock import RLock
from virtualenv.seed.wheels.embed import get_embed_wheel

from inventory.cluster import Cluster
from inventory.errors import InventoryProblem
from inventory.settings import load_settings, state_directory
from roles.environment.archive import Archive, ArchiveProblem, describe, recalled, remember
from roles.environment.spec import Declared, on_shared

RECIPE = 1
"""Counts changes of this module that change what is made."""

CACHES = {"__pycache__", ".cache", ".git"}
"""Folders of a directory that are left out: they change whenever it is used."""
OF_CACHES, NOTHING = re.compile("|".join(map(re.escape, sorted(CACHES)))), re.compile("(?!)")
"""Names that are left out of what is packed."""

SCRATCH, MADE = "making-", "made"
"""Beginning of a folder's name in which something is made, and the archive's name in it."""

CALLERS_OWN = re.compile(r"PYTHON|VIRTUAL_ENV|PIP_(TARGET|PREFIX|ROOT|USER|REQUIRE)")
"""Variables that would lead an installation elsewhere; where packages come from is pip's configuration to say."""

INCLUDED = re.compile(
    r"""(?mx) ^[ \t]* (?: -[ \t]+ ["']? )?             # in an environment.yml it is an item of a list
    (?: -[rc] | --requirement | --constraint ) [ \t=]*
    (?: "(?P<double>[^"\n]+)" | '(?P<single>[^'\n]+)' | (?P<bare>[^\s"']+) )"""
)
"""A file that a list for pip takes in."""

CONDA_TOOLS = ("micromamba", "mamba", "conda")

_lock = RLock()
_answers: dict[tuple[Path, Path], Path | ArchiveProblem] = {}
"""What was found once in a run of a source and its place here: every role and node asks."""


class Unread(ArchiveProblem):
    """The source lies on the shared storage, and nobody has read it yet."""


def last_read(cluster: Cluster, place: str) -> tuple[object, Archive] | None:
    """(identity that the head saw, what is in it) of a source on the shared storage."""
    return recalled(f"{cluster.name}:{place}")


def note_read(cluster: Cluster, place: str, identity: str, archive: Archive) -> None:
    """Keep what is in a source on the shared storage. Raises ArchiveProblem."""
    remember(f"{cluster.name}:{place}", identity, archive)


def described(cluster: Cluster, one: Declared) -> Archive:
    """What the environment's archive holds. Raises ArchiveProblem; Unread where that is only a matter of time."""
    if place := on_shared(cluster, one):
        known = last_read(cluster, place)
        if known is None:
            raise Unread(
                f"{place} on the shared storage was not read yet: converge its cluster once"
            )
        return known[1]
    path, source = archive_of(cluster, one), cluster.at_hand(one.spec.source)
    try:
        return describe(path, str(source))
    except ArchiveProblem as problem:
        if path != source:  # nobody will use it
            path.unlink(missing_ok=True)
            _answers[source, path.parent] = problem
        raise


def archive_of(cluster: Cluster, one: Declared) -> Path:
    """The environment's archive on this machine; made now where it must be. Raises ArchiveProblem.

    Of a source on the shared storage it is the path there.
    """
    source = cluster.at_hand(one.spec.source)
    if one.spec.archive is not None or on_shared(cluster, one):
        return source
    folder = folder_of(cluster, one)
    with _lock:
        if (source, folder) not in _answers:
            try:
                _answers[source, folder] = _from(source, cluster, one, folder)
            except ArchiveProblem as problem:
                _answers[source, folder] = problem
            except OSError as error:  # of a folder that this user may not enter
                _answers[source, folder] = ArchiveProblem(
                    f"{error.filename or source} cannot be read: {error.strerror or error}"
                )
        answer = _answers[source, folder]
    if isinstance(answer, ArchiveProblem):
        raise answer
    return answer


def folder_of(cluster: Cluster, one: Declared) -> Path:
    """Where this machine keeps what it makes for the environment."""
    return state_directory() / "environments" / cluster.name / one.name


def _from(source: Path, cluster: Cluster, one: Declared, folder: Path) -> Path:
    if one.spec.directory is not None:
        return _of_directory(source, folder)
    if one.spec.requirements is not None:
        return _of_requirements(cluster, one, source, folder)
    return _of_conda(source, folder)


# ---- a directory ----------------------------------------------------------------------------------


def _of_directory(directory: Path, folder: Path) -> Path:
    if not directory.is_dir():
        raise ArchiveProblem(f"there is no directory {directory} on this machine")

    def make(scratch: Path) -> None:
        pack(directory, scratch / MADE, OF_CACHES)
        if state_of(directory, OF_CACHES) != before:
            raise ArchiveProblem(f"{directory} changed while it was packed: run again")

    before = state_of(directory, OF_CACHES)
    return _made(folder, _key([RECIPE, before]), f"packing {directory}", make)


def state_of(directory: Path, left_out: re.Pattern[str]) -> str:
    """A directory's state by its files' names, kinds, sizes and times, without reading them.

    Raises ArchiveProblem for what cannot be read.
    """
    digest = hashlib.sha256()
    for path in entries(directory, left_out):
        try:
            status = path.lstat()
        except OSError as error:  # it went meanwhile
            raise ArchiveProblem(f"{path} cannot be read: {error.strerror}") from None
        told: tuple[object, ...] = ()  # a folder's time changes with its caches
        if stat.S_ISLNK(status.st_mode):
            told = (str(path.readlink()),)
        elif not stat.S_ISDIR(status.st_mode):
            told = status.st_size, status.st_mtime_ns
        name = str(path)[len(str(directory)) :]
        digest.update(ascii((name, status.st_mode, *told)).encode())
    return digest.hexdigest()


def entries(directory: Path, left_out: re.Pattern[str]) -> Iterator[Path]:
    """All below a directory, folders before their content, in an order that is always the same.

    left_out: names of files and folders that do not count. Raises ArchiveProblem for what cannot be read.
    """

    def failed(error: OSError) -> None:
        raise ArchiveProblem(f"{error.filename} cannot be read: {error.strerror}")

    for name, folders, files in os.walk(directory, onerror=failed):
        folders[:] = sorted(one for one in folders if not left_out.fullmatch(one))
        for one in sorted([*folders, *files]):
            if not one.startswith(".lockstep-") and not left_out.fullmatch(one):
                yield Path(name, one)


def pack(directory: Path, archive: Path, left_out: re.Pattern[str] = NOTHING) -> None:
    """A tar of what is in the directory: the same bytes for the same content, owned by root.

    Raises ArchiveProblem where a file cannot be read or the disk is full.
    """

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = 0 if member.isdir() else int(member.mtime)
        return member

    try:
        with _compressed(archive) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
            for path in entries(directory, left_out):
                tar.add(path, str(path.relative_to(directory)), recursive=False, filter=owned)
                tar.members = []  # type: ignore[attr-defined] # it would keep them all
    except OSError as error:
        where = error.filename or archive
        raise ArchiveProblem(
            f"{directory} cannot be packed: {where}: {error.strerror or error}"
        ) from None


@contextmanager
def _compressed(archive: Path) -> Iterator[IO[bytes]]:
    """Where to write a tar; compressed by zstd, or where it is missing by gzip, which every system has."""
    command = ["zstd", "-1", "-T0", "-q"] if shutil.which("zstd") else ["gzip", "-1", "-n"]
    with (
        archive.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file) as process,
    ):
        assert process.stdin is not None
        try:
            yield process.stdin
        except BaseException:
            process.kill()
            raise
        process.stdin.close()
    if process.returncode:
        raise OSError(0, f"{command[0]} ended with status {process.returncode}", str(archive))


# ---- packages -------------------------------------------------------------------------------------


def _of_requirements(cluster: Cluster, one: Declared, file: Path, folder: Path) -> Path:
    """A venv of this machine's Python, with exactly the listed wheels; their hashes decide."""
    spec = one.spec
    texts = _texts(file)
    assert spec.python is not None
    python = _interpreter(spec.python, file)
    if spec.wheels is not None:
        wheels = cluster.at_hand(spec.wheels)
        if not wheels.is_dir():
            raise ArchiveProblem(f"there is no directory of wheels {wheels} on this machine")
        origin = ["--no-index", "--find-links", str(wheels)]
    else:
        origin = _indexes(spec.index)

    def make(scratch: Path) -> None:
        venv, pip = scratch / "venv", get_embed_wheel("pip", spec.python or "")
        if pip is None:
            raise ArchiveProblem(
                f"{file}: there is no pip for Python {spec.python} on this machine: update virtualenv"
            )
        _run([python, "-I", "-m", "venv", "--without-pip", str(venv)], file)
        _run(
            [str(venv / "bin/python"), "-I", f"{pip.path}/pip", "install", "--no-input"]
            + ["--disable-pip-version-check", "--no-cache-dir"]
            + ["--require-hashes", "-r", str(file), *origin],
            file,
        )
        pack(venv, scratch / MADE)

    inputs = [RECIPE, texts, spec.python, python, platform.machine()]
    return _made(folder, _key(inputs), f"building Python {spec.python} with {file}", make)


def _indexes(own: str | None) -> list[str]:
    """pip's options for where packages come from: the declared index, or that of the settings and torch's."""
    if own is not None:
        return ["--index-url", own]
    try:
        settings = load_settings()
    except InventoryProblem as problem:
        raise ArchiveProblem(str(problem)) from None
    index = ["--index-url", settings.index] if settings.index else []
    torch = ["--extra-index-url", settings.torch_index] if settings.torch_index else []
    return [*index, *torch]


def _interpreter(version: str, file: Path) -> str:
    """The system's own Python of that version, which nodes are likely to have at the same place."""
    for candidate in (f"/usr/bin/python{version}", shutil.which(f"python{version}")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise ArchiveProblem(
        f"{file} is to be built for Python {version}, which this machine lacks: install python{version}, "
        "or pack the environment where it is"
    )


def _of_conda(file: Path, folder: Path) -> Path:
    """A conda environment of an environment.yml, by whichever of conda's tools is here."""
    texts = _texts(file)
    tool = next((one for one in CONDA_TOOLS if shutil.which(one)), None)

    def make(scratch: Path) -> None:
        if tool is None:
            raise ArchiveProblem(
                f"{file} needs {', '.join(CONDA_TOOLS[:-1])} or {CONDA_TOOLS[-1]} on this machine, and there is "
                "none: install one, or pack the environment where it is"
            )
        prefix = scratch / "env"
        verb = ["create"] if tool == "micromamba" else ["env", "create"]
        _run([tool, *verb, "--yes", "--prefix", str(prefix), "--file", str(file)], file)
        pack(prefix, scratch / MADE)

    return _made(folder, _key([RECIPE, texts, platform.machine()]), f"building {file}", make)


def _texts(file: Path) -> list[str]:
    """The text of a list of packages and of every file that it takes in. Raises ArchiveProblem."""
    texts: dict[Path, str] = {}
    left = [file]
    while left:
        now = left.pop()
        if now in texts:
            continue
        texts[now] = _text(now)
        for found in INCLUDED.finditer(texts[now]):
            name = found["double"] or found["single"] or found["bare"]
            if ":/" in name:
                raise ArchiveProblem(
                    f"{now} takes in {name}, where a change is not seen: keep a copy beside it"
                )
            left.append(Path(os.path.normpath(now.parent / name)))
    return list(texts.values())


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise ArchiveProblem(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ArchiveProblem(f"{file} is no text: give a list of packages") from None


def _run(command: Sequence[str], file: Path) -> None:
    """Run a builder's program without what the caller has set for his own. Raises ArchiveProblem."""
    kept = {name: text for name, text in os.environ.items() if not CALLERS_OWN.match(name)}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=kept,
            check=False,
        )
    except OSError as error:
        raise ArchiveProblem(f"{file}: {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        wrong = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
        raise ArchiveProblem(f"{file} cannot be built: {wrong[0][:300]}")


# ---- what is made ---------------------------------------------------------------------------------


def _key(inputs: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _made(folder: Path, key: str, what: str, make: Callable[[Path], None]) -> Path:
    """The archive of that key in the folder; where it is missing it is made, and replaces earlier ones."""
    archive = folder / f"{key[:32]}.tar"
    if archive.is_file():
        return archive
    print(f"lockstep: {what}", file=sys.stderr)
    try:
        with _alone(folder):
            if not archive.is_file():  # another run may have made it meanwhile
                with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
                    make(Path(scratch))
                    Path(scratch, MADE).replace(archive)
            for other in folder.glob("*.tar"):
                if other != archive:
                    other.unlink()
    except OSError as error:
        raise ArchiveProblem(f"{folder} cannot be written: {error.strerror or error}") from None
    return archive


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other run makes something in the folder; what a killed one left there goes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left)
        yield
