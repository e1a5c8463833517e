"""The local package repository that the nodes see at /srv/lockstep/packages: packages and their indexes.

It stands for the mirror or the offline bundle of a real cluster: all that the roles install and the
base image lacks, with every dependency, so that nodes need no internet. One directory serves
both families: .deb files with ``Packages``, RPMs with ``repodata``.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from deploy.lab import rpm, standins
from deploy.lab.commands import run, run_logged
from deploy.lab.errors import LabError
from deploy.lab.files import (
    PARTIAL,
    make_directory,
    read_json,
    remove_tree,
    write_json,
    write_whole,
)
from deploy.lab.host import Host
from deploy.lab.progress import Progress
from deploy.lab.state import Family, Paths

PACKAGES = ("pdsh", "rsync", "zstd", "chrony")
MOUNTED_AT = "/srv/lockstep/packages"
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:=[A-Za-z0-9.+:~-]+)?")
"""A package, or one version of it as ``name=version``."""


def wanted(extra: Iterable[str]) -> list[str]:
    """The default packages and the extra ones, each once.

    Raises LabError for what is no package name.
    """
    names = list(dict.fromkeys([*PACKAGES, *extra]))
    for name in names:
        if not PACKAGE_NAME.fullmatch(name):
            raise LabError(
                f"{name!r} is no package name: use the name that apt knows, or name=version"
            )
    return names


def apt_configuration(directory: Path, status: Path, architecture: str) -> str:
    """apt.conf that resolves against the packages of a status file and touches nothing of the host's apt."""
    settings = {
        "Dir::State": directory / "state",
        "Dir::State::lists": directory / "lists",
        "Dir::State::status": status,
        "Dir::State::extended_states": directory / "state/extended_states",
        "Dir::Cache": directory / "cache",
        "Dir::Etc::sourcelist": directory / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        "Dir::Log": directory,
        "APT::Architecture": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
        "Acquire::Languages": "none",
    }
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    cleared = [
        f"#clear {name};"
        for name in (
            "APT::Update::Post-Invoke",
            "APT::Update::Post-Invoke-Success",
            "DPkg::Post-Invoke",
        )
    ]
    return "".join(f"{line}\n" for line in [*cleared, *lines])


def ensure_repository(
    paths: Paths, host: Host, keys: Mapping[Family, str], extra: Iterable[str], progress: Progress
) -> None:
    """Download what is missing in the repository and index it; with RPM nodes, make RPMs of it.

    keys: the nodes' base images; packages are resolved against Debian's where it is one of them, because
    the other holds more. The directory is changed in place, a file at a time, because running nodes have
    it mounted. Raises LabError when a package cannot be had.
    """
    ensure_debs(paths, host, keys["debian"] if "debian" in keys else keys["rpm"], extra, progress)
    if "rpm" in keys:
        image = paths.cache / keys["rpm"]
        rpm.ensure_rpms(paths.repository, paths.state / "rpms.json", image, progress)


def ensure_debs(
    paths: Paths, host: Host, key: str, extra: Iterable[str], progress: Progress
) -> None:
    """Have the .deb files and their index. Raises LabError."""
    names = wanted(extra)
    marker = paths.state / "repository.json"
    make_directory(paths.repository)
    state = read_json(marker) or {}
    held = state.get("packages", []) if state.get("base") == key else []
    complete = state.get("base") == key and (paths.repository / "Packages").is_file()
    if complete and set(names) <= set(held):
        files = standins.build(paths.repository, host.architecture)
        index = (paths.repository / "Packages").read_text()
        if not all(f"Filename: ./{name}\n" in index for name in files):
            write_index(paths.repository)
        progress(f"packages: {', '.join(names)} (from the cache)")
        return
    began = progress.seconds
    marker.unlink(missing_ok=True)
    directory = paths.state / "apt"
    remove_tree(directory)
    for name in ("state", "cache/archives/partial", "lists"):
        (directory / name).mkdir(parents=True)
    shutil.copy(paths.cache / key / "sources.list", directory / "sources.list")
    shutil.copytree(paths.cache / key / "lists", directory / "lists", dirs_exist_ok=True)
    (directory / "lists/partial").mkdir(exist_ok=True)
    status = paths.cache / key / "status"
    write_whole(directory / "apt.conf", apt_configuration(directory, status, host.architecture))
    log = paths.state / "repository.log"
    log.unlink(missing_ok=True)
    download(directory, names, log)
    if not complete:
        for stale in paths.repository.glob("*.deb"):
            stale.unlink()
    for deb in (directory / "cache/archives").glob("*.deb"):
        beside = paths.repository / f"{deb.name}{PARTIAL}"
        shutil.copyfile(deb, beside)
        beside.chmod(0o644)
        beside.replace(paths.repository / deb.name)
    for left in paths.repository.glob(f"*{PARTIAL}*"):
        left.unlink()
    standins.build(paths.repository, host.architecture)
    debs = write_index(paths.repository)
    write_json(marker, {"base": key, "packages": sorted({*held, *names})})
    remove_tree(directory)
    progress(f"packages: {', '.join(names)}: {debs} files in {progress.seconds - began:.0f} s")


def download(directory: Path, names: list[str], log: Path) -> None:
    """Fetch the packages and their dependencies; lists that are out of date are renewed once."""
    changes = {"APT_CONFIG": str(directory / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
    fetch = ["apt-get", "--yes", "--quiet", "--download-only", "install", *names]
    try:
        run_logged(fetch, log, "downloading packages", changes=changes)
    except LabError:
        run_logged(["apt-get", "--quiet", "update"], log, "reading package lists", changes=changes)
        run_logged(fetch, log, "downloading packages", changes=changes)


def write_index(directory: Path) -> int:
    """Write the index of the .deb files there, at once; returns how many they are."""
    debs = sorted(directory.glob("*.deb"))
    write_whole(directory / "Packages", "\n".join(index_entry(deb) for deb in debs))
    return len(debs)


def index_entry(deb: Path) -> str:
    """The stanza of one .deb in a ``Packages`` index: its control fields, file name, size and digest."""
    control = run(["dpkg-deb", "--field", str(deb)]).rstrip("\n")
    content = deb.read_bytes()
    return stanza(control, deb.name, len(content), hashlib.sha256(content).hexdigest())


def stanza(control: str, name: str, size: int, sha256: str) -> str:
    """An index stanza. size: bytes."""
    return f"{control}\nFilename: ./{name}\nSize: {size}\nSHA256: {sha256}\n"
