"""Packages of Debian and Ubuntu with all that they depend on, by an apt of its own: nothing of this machine's changes.

It resolves for a node that has nothing, so that every node of that release finds all it could lack.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from deploy.bundle.store import BundleError, Store, digest
from deploy.bundle.tools import run
from deploy.bundle.wanted import System
from deploy.lab.files import make_directory, write_whole
from deploy.lab.host import parse_os_release, read_host
from deploy.lab.repository import apt_configuration, write_index

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class File(NamedTuple):
    """One package as apt names it. size: bytes."""

    uri: str
    name: str
    size: int
    sha256: str


def gather(
    store: Store, system: System, sources: Sequence[str], work: Path
) -> tuple[int, int, int]:
    """Have the repository of that system. work: for apt's lists, kept between runs.

    sources: lines of a sources.list; they name this machine's own too where it has the same system.
    Returns how many packages there are, and how many were fetched, of how many bytes. Raises BundleError.
    """
    folder = store.folder / "packages" / system.folder
    lines = [*sources, *own_sources(system)]
    if not lines:
        raise BundleError(
            f"no source of packages for {system.folder} ({', '.join(system.nodes)}): this machine is of another "
            "system, so declare one with 'os: apt' under packages.sources"
        )
    for name in ("state", "archives/partial", "lists/partial", folder / "partial"):
        make_directory(work / name)
    write_whole(work / "sources.list", "".join(f"{line}\n" for line in lines))
    write_whole(work / "status", "")
    architecture = ARCHITECTURES.get(system.machine)
    if architecture is None or shutil.which("apt-get") is None:
        raise BundleError(
            f"packages for {system.folder} cannot be gathered here: that takes apt-get, and nodes of "
            f"{' or '.join(ARCHITECTURES)}"
        )
    configuration = apt_configuration(work, work / "status", architecture)
    write_whole(work / "apt.conf", f'{configuration}Dir::Cache::archives "{work}/archives";\n')
    _apt(work, system, "update")
    install = ["install", "--", *system.packages]
    files = parse_uris(_apt(work, system, "-oAcquire::ForceHash=SHA256", "--print-uris", *install))
    missing = [file for file in files if not _right(folder / file.name, file)]
    (folder / "lock").unlink(missing_ok=True)
    remote = [file for file in missing if not file.uri.startswith("file:")]
    for file in missing:
        (folder / file.name).unlink(missing_ok=True)
        if file not in remote:
            source = Path(unquote(urlsplit(file.uri).path))
            store.copy(source, f"packages/{system.folder}/{file.name}")
    if remote:  # apt goes on with what arrived in part
        _apt(work, system, "--download-only", f"-oDir::Cache::archives={folder}", *install)
    for file in files:
        if file in missing and not _right(folder / file.name, file):
            raise BundleError(f"{file.uri} did not arrive as its index says: run this again")
        store.keep(f"packages/{system.folder}/{file.name}")
    names = {file.name for file in files}
    for path in folder.glob("*.deb"):
        if path.name not in names:
            path.unlink()
    write_index(folder)
    store.keep(f"packages/{system.folder}/Packages")
    return len(files), len(missing), sum(file.size for file in missing)


def own_sources(system: System) -> list[str]:
    """This machine's sources of its distribution, where it is of that system."""
    try:
        release = parse_os_release(Path("/etc/os-release").read_text())
    except OSError:
        return []
    if (release.get("ID"), release.get("VERSION_ID")) != (system.id, system.release):
        return []
    return [source.line() for source in read_host().sources]


def parse_uris(text: str) -> list[File]:
    """The files in what ``apt-get --print-uris`` prints. Raises BundleError for one without a digest."""
    found = []
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        uri, name, size, checksum = [*shlex.split(line), ""][:4]
        algorithm, _, sha256 = checksum.partition(":")
        if algorithm != "SHA256":
            raise BundleError(f"{uri} has no SHA-256 digest in its index: use a newer repository")
        found.append(File(uri, name, int(size), sha256))
    return found


def _right(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size and digest(path) == file.sha256


def _apt(work: Path, system: System, *words: str) -> str:
    return run(
        f"packages for {system.folder}",
        ["apt-get", "-y", "-q", *words],
        APT_CONFIG=str(work / "apt.conf"),
        DEBIAN_FRONTEND="noninteractive",
    )
