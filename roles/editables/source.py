"""The source of an editable install on the control machine: packed by content, and what it is built with."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from inventory.cluster import Cluster
from inventory.settings import state_directory
from roles.environment.archive import Archive
from roles.environment.parcel import Parcel
from roles.environment.spec import Declared, normal_name
from roles.pins.prove import Installed, unmet
from roles.pins.requirements import markers, of_archive
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
    found = unmet({**there, **build}, markers(archive, ""))
    return [
        f"{each.requirement} (it has {each.have})" if each.have else each.requirement
        for each in found
        if not each.distribution
    ]


@cache
def _source(folder: Path, name: str, state: Path) -> Source:
    if not folder.is_dir():
        raise SourceProblem(f"there is no folder {folder} on this machine")
    requires = _build_requirements(folder, name)
    try:
        packed = _pack(folder, state / "sources" / name)
    except OSError as error:
        raise SourceProblem(
            f"{error.filename or folder} cannot be read: {error.strerror}"
        ) from None
    return Source(Parcel(packed, packed.stem, f"sources/{packed.name}"), requires)


def _build_requirements(folder: Path, name: str) -> tuple[str, ...]:
    path = folder / "pyproject.toml"
    if not path.is_file():
        if not (folder / "setup.py").is_file():
            raise SourceProblem(
                f"{folder} has neither pyproject.toml nor setup.py: pip cannot build it"
            )
        return ("setuptools",)
    told: dict[str, Any]
    try:
        told = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
        own = told.get("project", {}).get("name", name)
        system = told.get("build-system", {})
        requires = tuple(map(str, system.get("requires", ["setuptools"])))
    except (OSError, TOMLKitError, ValueError, AttributeError, TypeError) as error:
        raise SourceProblem(f"{path} cannot be read: {error}") from None
    if normal_name(str(own)) != name:
        raise SourceProblem(f"{path} is that of {own}, not of {name}")
    return requires


def _pack(folder: Path, into: Path) -> Path:
    """A tar that is the same for the same content, whoever packs it and when; named by its SHA-256."""
    into.mkdir(parents=True, exist_ok=True)
    fresh = into / f"packing.{os.getpid()}"
    total = 0
    try:
        with tarfile.open(fresh, "w", format=tarfile.PAX_FORMAT) as tar:
            for path in _files(folder):
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
        status = fresh.stat()
        digest = digest_of(fresh, status.st_size, status.st_mtime_ns)
        packed = fresh.replace(into / f"{digest}.tar")
    finally:
        fresh.unlink(missing_ok=True)
    for old in into.glob("*.tar"):  # another run may still be sending a young one
        if old.stat().st_mtime < packed.stat().st_mtime - KEPT_SECONDS:
            old.unlink(missing_ok=True)
    return packed


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if LEFT_OUT.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _member(folder: Path, path: Path) -> tarfile.TarInfo:
    member = tarfile.TarInfo(str(path.relative_to(folder)))
    member.mtime = TIME
    if path.is_symlink():
        target = str(path.readlink())
        inside = Path(os.path.normpath(path.parent / target)).is_relative_to(folder)
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
