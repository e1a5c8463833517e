"""RPMs with all that they depend on, by dnf with a root of its own: nothing of this machine's changes.

It resolves for a node that has nothing, so that every node of that release finds all it could lack. dnf 4
checks the signatures with the declared sources' keys; dnf 5 checks none of what it only downloads.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deploy.bundle.store import BundleError, Store
from deploy.bundle.tools import run
from deploy.bundle.wanted import System
from deploy.lab.files import make_directory, remove_tree, write_whole
from deploy.lab.host import parse_os_release
from roles.packages.bundle import INDEX, ONE_MAJOR, system_of

TOOLS = {"dnf": "dnf", "createrepo_c": "createrepo-c"}
"""What it takes, and Debian's packages of it."""
DNF4 = ("dnf-3", "dnf4", "dnf")
"""Its names; the last may be dnf 5."""


def gather(
    store: Store, system: System, sources: Sequence[str], work: Path
) -> tuple[int, int, int]:
    """Have the repository of that system. work: for dnf's root and cache, kept between runs.

    sources: sections of a .repo file; this machine's own count too where it has the same system.
    Returns how many packages there are, and how many were fetched, of how many bytes. Raises BundleError.
    """
    tools = {"dnf": _dnf(), "createrepo_c": shutil.which("createrepo_c")}
    lacking = [package for tool, package in TOOLS.items() if tools[tool] is None]
    if lacking:
        raise BundleError(
            f"packages for {system.folder} are gathered with {' and '.join(TOOLS)}: "
            f"install {' '.join(lacking)} on this machine (Debian and RHEL have them)"
        )
    place = f"packages/{system.folder}"
    folder = make_directory(store.folder / place)
    repositories = [str(work / "repos")]
    if _is_own(system):
        repositories.append("/etc/yum.repos.d")
    elif not sources:
        raise BundleError(
            f"no source of packages for {system.folder} ({', '.join(system.nodes)}): this machine is of another "
            "system, so declare one with 'os: rpm' under packages.sources"
        )
    make_directory(work / "repos")
    write_whole(work / "repos/declared.repo", "\n".join(sources))
    before = {path.name for path in folder.glob("*.rpm") if store.has(f"{place}/{path.name}")}
    for path in folder.glob("*.rpm"):  # what is damaged, or may be cut
        if path.name not in before:
            path.unlink()
    arrived = work / "arrived"
    remove_tree(arrived)
    make_directory(arrived)
    for name in before:  # dnf takes what lies there for fetched when its digest is right
        (arrived / name).hardlink_to(folder / name)
    remove_tree(work / "root")
    release = system.release.partition(".")[0] if system.id in ONE_MAJOR else system.release
    options = [
        f"--installroot={make_directory(work / 'root')}",
        f"--releasever={release}",
        f"--forcearch={system.machine}",
        f"--setopt=reposdir={','.join(repositories)}",
        f"--setopt=cachedir={work / 'cache'}",
        f"--setopt=module_platform_id=platform:el{release}",
        "--setopt=install_weak_deps=False",
        "--setopt=keepcache=True",
        f"--downloaddir={arrived}",
    ]
    run(
        f"packages for {system.folder}",
        [str(tools["dnf"]), "-y", "-q", *options, "--downloadonly", "install", *system.packages],
    )
    fresh, size = 0, 0
    names = {path.name for path in arrived.glob("*.rpm")}
    for name in sorted(names):
        if name not in before:
            store.copy(arrived / name, f"{place}/{name}")
            os.utime(folder / name, (0, 0))  # the index names it
            fresh, size = fresh + 1, size + (arrived / name).stat().st_size
    for name in before - names:
        (folder / name).unlink()
    _index(store, system, place, changed=names != before)
    remove_tree(arrived)
    return len(names), fresh, size


def _dnf() -> str | None:
    """dnf 4, whatever its name here; None where there is no dnf at all. Raises BundleError for dnf 5 alone."""
    found = [path for name in DNF4 if (path := shutil.which(name))]
    old = [path for path in found if not os.path.realpath(path).endswith("dnf5")]
    if found and not old:
        raise BundleError(
            f"{found[0]} is dnf 5, which does not check the signatures of what it downloads: install python3-dnf "
            "on this machine, which brings dnf-3"
        )
    return old[0] if old else None


def _index(store: Store, system: System, place: str, changed: bool) -> None:
    """Write the index anew where it is not that of the packages; the same packages give the same."""
    folder = store.folder / place
    index = [path for path in (folder / "repodata").glob("*") if path.is_file()]
    names = [f"{place}/{path.relative_to(folder)}" for path in index]
    if not changed and f"{place}/{INDEX['rpm']}" in names and all(map(store.has, names)):
        return
    remove_tree(folder / "repodata")
    same = ["--revision=0", "--set-timestamp-to-revision"]
    run(f"packages for {system.folder}", ["createrepo_c", "--quiet", *same, str(folder)])
    for path in (folder / "repodata").iterdir():
        store.keep(f"{place}/{path.relative_to(folder)}")


def _is_own(system: System) -> bool:
    try:
        release = parse_os_release(Path("/etc/os-release").read_text())
    except OSError:
        return False
    own = system_of(release.get("ID", ""), release.get("VERSION_ID", ""), system.machine)
    return own == system.folder
