"""The source of an editable install on the control machine: packed by content, and what it is built with.

It is packed again only when a file's name, size or time changed, or what was packed is damaged. It is a
folder, or what was packed of one, as ``lockstep bundle`` gathers it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from inventory.cluster import Cluster
from inventory.settings import state_directory
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.parcel import Parcel
from roles.environment.sources import entries, state_of
from roles.environment.spec import Declared, normal_name
from roles.pins.prove import Installed
from roles.pins.requirements import of_archive, unmet_on
from roles.pins.wheels import digest_of

MAX_BYTES = 1 << 30
LEFT_OUT = re.compile(
    r"\.git|\.hg|\.svn|__pycache__|\.venv|\.tox|\.nox|\..*_cache|.*\.py[co]|.*\.egg-info"
)
"""Not a part of the source: history, environments, and what tools write beside it."""
KEPT_SECONDS = 86_400
"""How long an earlier content stays packed on this machine."""
TIME = 946_684_800
"""Every file's, in seconds: 2000-01-01, which zip archives can say too."""
SELF_SUFFICIENT_SETUPTOOLS = (70, 1)
"""From this version on setuptools needs no package ``wheel``, although older projects still name it."""


class SourceProblem(Exception):
    """The source cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Source:
    """parcel: the packed source. requires: what builds it, as pyproject.toml spells it."""

    parcel: Parcel
    requires: tuple[str, ...]


def source_of(cluster: Cluster, one: Declared, name: str) -> Source:
    """The declared source of an editable distribution. Raises SourceProblem.

    It is read once a run, so that every node gets the same.
    """
    return _source(cluster.at_hand(one.spec.editable[name]), normal_name(name), state_directory())


def lacking(source: Source, archive: Archive) -> list[str]:
    """What builds the source and is not in the environment: requirements, in words."""
    there = of_archive(archive)
    setuptools = there.get("setuptools", Installed("", ())).version
    release = tuple(int(part) for part in re.findall(r"\d+", setuptools)[:2])
    needed = tuple(
        text
        for text in source.requires
        if normal_name(text) != "wheel" or release < SELF_SUFFICIENT_SETUPTOOLS
    )
    build = {"": Installed("", needed)}
    found = unmet_on(archive, "", {**there, **build})
    return [
        f"{each.requirement} (it has {each.have})" if each.have else each.requirement
        for each in found
        if not each.distribution
    ]


@cache
def _source(place: Path, name: str, state: Path) -> Source:
    try:
        if place.is_file():
            return _of_tar(place, name)
        if not place.is_dir():
            raise SourceProblem(f"there is no folder {place} on this machine")
        requires = _build_requirements(place, name, lambda file: _text(place / file))
        packed = _packed(place, state / "sources" / name)
    except ArchiveProblem as problem:
        raise SourceProblem(str(problem)) from None
    except OSError as error:
        raise SourceProblem(
            f"{error.filename or place} cannot be read: {error.strerror or error}"
        ) from None
    return Source(Parcel(packed, packed.stem, f"sources/{packed.name}"), requires)


def _digest(file: Path) -> str:
    status = file.stat()
    return digest_of(file, status.st_size, status.st_mtime_ns)


def _text(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _of_tar(packed: Path, name: str) -> Source:
    """What was packed already. Raises OSError too."""
    try:
        with tarfile.open(packed, "r:") as tar:
            files = {member.name: member for member in tar if not member.isdir()}

            def read(file: str) -> bytes | None:
                found = tar.extractfile(files[file]) if file in files else None
                return found.read() if found else None

            requires = _build_requirements(packed, name, read)
    except (tarfile.TarError, KeyError) as error:  # or a link that leads nowhere
        raise SourceProblem(
            f"{packed} is neither a folder nor a plain tar of one: {error}"
        ) from None
    digest = _digest(packed)
    return Source(Parcel(packed, digest, f"sources/{digest}.tar"), requires)


def _build_requirements(
    place: Path, name: str, read: Callable[[str], bytes | None]
) -> tuple[str, ...]:
    """read: content of a file of the source, or None where it has none such."""
    path, told = place / "pyproject.toml", read("pyproject.toml")
    if told is None:
        if read("setup.py") is None:
            raise SourceProblem(
                f"{place} has neither pyproject.toml nor setup.py: pip cannot build it"
            )
        return ("setuptools",)
    values: dict[str, Any]
    try:
        values = tomlkit.parse(told).unwrap()
        own = values.get("project", {}).get("name", name)
        system = values.get("build-system", {})
        requires = tuple(map(str, system.get("requires", ["setuptools"])))
    except (TOMLKitError, ValueError, AttributeError, TypeError) as error:
        raise SourceProblem(f"{path} cannot be read: {error}") from None
    if normal_name(str(own)) != name:
        raise SourceProblem(f"{path} is that of {own}, not of {name}")
    return requires


def _packed(folder: Path, into: Path) -> Path:
    """What was packed of the folder as it is now, which a link remembers; packed now where nothing was."""
    before = state_of(folder, LEFT_OUT)
    key = hashlib.sha256(f"{folder}\n{before}".encode()).hexdigest()
    link = into / f"{key}.packed"
    if link.is_file():
        packed = into / link.readlink()
        if _digest(packed) == packed.stem:
            packed.touch()  # it is young again: no other run may forget it
            return packed
    packed = _pack(folder, into)
    if state_of(folder, LEFT_OUT) != before:
        raise SourceProblem(f"{folder} changed while it was packed: run again")
    for old in into.glob("*.packed"):
        if not old.is_file():  # what it leads to was forgotten
            old.unlink(missing_ok=True)
    with suppress(FileExistsError):  # another run packed the same
        link.symlink_to(packed.name)
    return packed


def _pack(folder: Path, into: Path) -> Path:
    """A tar that is the same for the same content, whoever packs it and when; named by its SHA-256."""
    into.mkdir(parents=True, exist_ok=True)
    fresh = into / f"packing.{os.getpid()}"
    total = 0
    try:
        with tarfile.open(fresh, "w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(entries(folder, LEFT_OUT)):
                if path.is_dir() and not path.is_symlink():
                    continue
                member = _member(folder, path)
                total += member.size
                if total > MAX_BYTES:
                    raise SourceProblem(
                        f"{folder} holds more than {MAX_BYTES >> 30} GiB: move data and checkpoints out of it"
                    )
                if member.isreg():
                    with path.open("rb") as file:
                        tar.addfile(member, file)
                else:
                    tar.addfile(member)
        packed = fresh.replace(into / f"{_digest(fresh)}.tar")
    finally:
        fresh.unlink(missing_ok=True)
    for old in into.glob("*.tar"):  # another run may still be sending a young one
        if old.stat().st_mtime < packed.stat().st_mtime - KEPT_SECONDS:
            old.unlink(missing_ok=True)
    return packed


def _member(folder: Path, path: Path) -> tarfile.TarInfo:
    member = tarfile.TarInfo(str(path.relative_to(folder)))
    member.mtime = TIME
    if path.is_symlink():
        target = str(path.readlink())
        leads = os.path.normpath(path.parent / target)
        inside = Path(leads).is_relative_to(os.path.normpath(folder))
        if target.startswith("/") or not inside:
            raise SourceProblem(
                f"{path} is a link to {target}, which does not travel with {folder}"
            )
        member.type, member.linkname = tarfile.SYMTYPE, target
    elif path.is_file():
        status = path.stat()
        member.size = status.st_size
        member.mode = 0o755 if status.st_mode & 0o111 else 0o644
    else:
        raise SourceProblem(f"{path} is no file, folder or link")
    return member
