"""How a node's NCCL differs from the cluster file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from inventory.cluster import Cluster
from roles.core.role import Finding, Peers, Target
from roles.environment.probe import archive_of
from roles.environment.spec import Declared, Environments, of_metadata
from roles.nccl.probe import Library, NcclState
from roles.nccl.spec import AUTO, DEBS, RPMS, NcclSpec, declared_environments, environment_of
from roles.nccl.version import Cuda, cuda_of, nearest, read, upstream_of_distribution
from roles.packages.fences import differing, open_fence
from roles.packages.managers import full_names

WHEELS = "nvidia-nccl-cu"


@dataclass(frozen=True)
class Wanted:
    """upstream: NCCL's own version. package: the packages' version; None where none is known to exist."""

    upstream: str
    package: str | None


def package_names(spec: NcclSpec, state: NcclState) -> list[str]:
    """The packages that must have one version: the library, and the headers if wanted or installed."""
    library, headers, *more = DEBS if state.manager == "apt" else RPMS
    names = [library, *([headers] if spec.dev or headers in state.packages else [])]
    return [*names, *(name for name in more if name in state.packages)]


def installed(state: NcclState) -> str | None:
    """The version of the library's package, or None."""
    library = (DEBS if state.manager == "apt" else RPMS)[0]
    versions = [one.version for one in state.packages.get(library, ())]
    return " and ".join(versions) or None


def wheels_in(folders: Iterable[str]) -> dict[str, str]:
    """Name to version of the nvidia-nccl-cu* distributions among metadata folders."""
    pairs = [of_metadata(folder) for folder in folders]
    return {name: version for name, version in pairs if name.startswith(WHEELS)}


def archive_folders(cluster: Cluster, one: Declared) -> tuple[str, ...]:
    """Metadata folders in the archive of an environment."""
    archive = archive_of(cluster, one)
    return archive.distributions if archive else ()


def _folders(target: Target[NcclSpec], state: NcclState) -> tuple[Iterable[str], Iterable[str]]:
    """Metadata folders of the environment to ask: in its archive, and on the node."""
    one = environment_of(target.spec, target.cluster)
    if one is None:
        return (), ()
    return archive_folders(target.cluster, one), state.distributions.get(one.name, ())


def wanted(target: Target[NcclSpec], state: NcclState) -> Wanted | Finding | None:
    """What the packages must be; a finding where that cannot be said; None while nobody can know.

    The environment role names an environment that is not there or not proved yet; after it this role
    looks again.
    """
    spec = target.spec
    cuda = _cuda(target, state)
    upstream: str | None
    if spec.version == AUTO:
        upstream = state.facts.get("nccl")
        if upstream is None or " and " in upstream:
            packed, there = _folders(target, state)
            wheels = wheels_in(packed) or wheels_in(there)
            upstream = next(iter(wheels.values())) if len(set(wheels.values())) == 1 else None
        upstream = upstream_of_distribution(upstream or "")
        if upstream is None:
            return _undecided(target, state)
    else:
        declared = read(spec.version)
        assert declared is not None  # the spec checked it
        if declared.revision is not None:
            return Wanted(declared.upstream, spec.version)
        upstream = declared.upstream
    names = package_names(spec, state)
    package = nearest(upstream, cuda, _candidates(names, state))
    if package is None and state.offered is None and cuda and cuda[1] is not None:
        package = f"{upstream}-1+cuda{cuda[0]}.{cuda[1]}"
    return Wanted(upstream, package)


def _cuda(target: Target[NcclSpec], state: NcclState) -> Cuda | None:
    packed, there = _folders(target, state)
    return cuda_of(state.facts.get("torch", ""), [*there, *packed])


def installs(target: Target[NcclSpec], state: NcclState) -> list[str]:
    """The packages at the wanted version; where only NCCL's own is known, any revision for that CUDA."""
    want = wanted(target, replace(state, packages={}, offered=None))
    if not isinstance(want, Wanted):
        return []
    version, cuda = target.spec.version, _cuda(target, state)
    if version != want.package:
        version = f"{want.upstream}-*" + (f"+cuda{cuda[0]}.*" if cuda else "")
    return full_names(state.manager, dict.fromkeys(package_names(target.spec, state), version))


def _candidates(names: list[str], state: NcclState) -> set[str]:
    """Versions that all these packages have: on offer, or installed already."""
    here = [{one.version for one in state.packages.get(name, ())} for name in names]
    found = set.intersection(*here)
    if state.offered is not None:
        found |= set.intersection(*(set(state.offered[name]) for name in names))
    return found


def _undecided(target: Target[NcclSpec], state: NcclState) -> Finding | None:
    one = environment_of(target.spec, target.cluster)
    name = one.name if one else "the environment"
    torch = state.facts.get("torch")
    section = target.cluster.section("environments", Environments)
    if torch is None and section is not None and section.manage != "unmanaged":
        return None
    if torch is not None and " and " in state.facts.get("nccl", ""):
        return None  # two wheels: named by their own finding, or taken away with the tree
    return Finding(
        "nccl-auto",
        f"the version that torch in {name} was built with",
        f"torch {torch} has no NCCL: it is a build without CUDA"
        if torch
        else "no torch that was proved, and no nvidia-nccl-cu* distribution",
        "pack the environment with the CUDA build of torch, or write the version under nccl.version",
        repairable=False,
    )


def drift(target: Target[NcclSpec], state: NcclState, peers: Peers) -> list[Finding]:
    """Findings: wrong, missing, unheld or damaged packages, another library in the way, two wheels."""
    return list(_findings(target, state))


def _findings(target: Target[NcclSpec], state: NcclState) -> Iterator[Finding]:
    section = target.cluster.section("environments", Environments)
    unmanaged = section is not None and section.manage == "unmanaged"
    for one in declared_environments(target.cluster):
        # What was added to a managed one goes with its tree.
        folders = (
            state.distributions.get(one.name, ())
            if unmanaged
            else archive_folders(target.cluster, one)
        )
        wheels = wheels_in(folders)
        if len(wheels) > 1:
            both = " and ".join(f"{name} {version}" for name, version in sorted(wheels.items()))
            yield Finding(
                "nccl-two-wheels",
                f"one nvidia-nccl-cu* distribution in the environment {one.name}",
                f"{both}: they write the same files, and the last one wins",
                "uninstall both, install the one that torch requires, and make the archive anew",
                repairable=False,
            )
    want = wanted(target, state)
    if isinstance(want, Finding):
        yield want
    if not isinstance(want, Wanted):
        return
    yield from _packages(target.spec, state, want)
    for stray in strays(state, want):
        allowed = may_go(target, stray)
        yield Finding(
            "nccl-version-mismatch",
            f"no NCCL but {want.upstream} where the loader looks",
            f"{stray.version or 'an unknown version'} at {stray.real}{_because(stray)}",
            "moved to /var/lib/lockstep/removed" if allowed else _advice(target, stray),
            repairable=allowed,
            disturbs=allowed,
        )


def _advice(target: Target[NcclSpec], stray: Library) -> str:
    owner = _owner(target.cluster, stray)
    if owner is None:
        return f"remove it, or list {stray.real} under nccl.remove"
    setting = "/etc/ld.so.conf.d" if stray.place == "cache" else stray.place
    return f"it is a part of the environment {owner}: take its folder out of {setting}"


def _because(stray: Library) -> str:
    return "" if stray.place in ("cache", "directory") else f", which {stray.place} leads to"


def _packages(spec: NcclSpec, state: NcclState, want: Wanted) -> Iterator[Finding]:
    names = package_names(spec, state)
    if want.package is None:
        on_offer = set().union(*state.offered.values()) if state.offered else set()
        yield _not_offered(f"{', '.join(names)} {want.upstream}", on_offer, state)
        return
    versions = dict.fromkeys(names, want.package)
    wrong = differing(versions, state.packages)
    if wrong:
        lacking = [
            name
            for name in names
            if state.offered is not None and want.package not in state.offered[name]
        ]
        if lacking:
            assert state.offered is not None
            offered = state.offered[lacking[0]]
            yield _not_offered(f"{', '.join(lacking)} {want.package}", offered, state)
            return
        some = any(name in state.packages for name in names)
        yield Finding(
            "nccl-version-mismatch" if some else "nccl-missing",
            f"{', '.join(names)} {want.package}",
            ", ".join(f"{name} {seen}" for name, seen in wrong.items())
            if some
            else "not installed",
            "they are installed in one transaction, then pinned and held",
            disturbs=some,
        )
        if state.manager == "rpm" and state.locks is None:
            yield _no_locker()
        return
    if state.gone or state.damage:
        yield Finding(
            "nccl-damaged",
            f"the files of {', '.join(names)} as delivered",
            state.damage or f"{', '.join(state.gone)}: no such file",
            "the packages are installed again",
            disturbs=True,
        )
    if state.manager == "rpm" and state.locks is None:
        yield _no_locker()
    elif (open_ := open_fence(state.manager, versions, state.packages, state.locks)) is not None:
        yield Finding(
            "nccl-unheld",
            f"{', '.join(names)} {'held' if state.manager == 'apt' else 'locked'} at {want.package}",
            open_,
            "held" if state.manager == "apt" else "the lock list is written",
        )
    if (
        state.manager == "apt"
        and (state.pin or "").strip() != pin_text(names, want.package).strip()
    ):
        yield Finding(
            "nccl-pin",
            f"apt prefers {want.package}",
            "no such preference" if state.pin is None else "another preference",
            "the preferences file is written",
        )


def _not_offered(what: str, offered: Iterable[str], state: NcclState) -> Finding:
    listed = ", ".join(sorted(offered)) or "none"
    tool = "apt" if state.manager == "apt" else "dnf"
    return Finding(
        "nccl-not-offered",
        f"{what} in {tool}'s sources",
        f"versions on offer: {listed}"
        if state.offered is not None
        else "what is on offer is not known",
        "put these packages into the repository, or write a version that is on offer under nccl.version",
        repairable=False,
    )


def pin_text(names: Iterable[str], version: str) -> str:
    """Our preferences file: above 1000, so that apt takes this version even where it is the older one."""
    return (
        "# Written by Lockstep; changes are lost.\n"
        f"Package: {' '.join(names)}\nPin: version {version}\nPin-Priority: 1001\n"
    )


def _no_locker() -> Finding:
    return Finding(
        "nccl-no-lock",
        "dnf's plug-in versionlock, switched on",
        "no such plug-in: the next upgrade may replace NCCL",
        "install python3-dnf-plugin-versionlock (yum-plugin-versionlock on release 7) and leave it enabled",
        repairable=False,
    )


def strays(state: NcclState, want: Wanted) -> list[Library]:
    """Libraries of another version that the loader finds and that no package of ours owns, each once."""
    found: dict[str, Library] = {}
    for one in state.libraries:
        if one.real not in state.owned and one.version != want.upstream:
            known = found.get(one.real)
            if known is None or known.place in ("cache", "directory"):
                found[one.real] = one
    return list(found.values())


def may_go(target: Target[NcclSpec], stray: Library) -> bool:
    """Whether the spec allows to take it out of the way; never a part of an environment."""
    return _owner(target.cluster, stray) is None and any(
        PurePosixPath(path).is_relative_to(allowed)
        for path in (stray.real, stray.path)
        for allowed in target.spec.remove
    )


def _owner(cluster: Cluster, stray: Library) -> str | None:
    """The declared environment that the file is a part of, by name."""
    inside = PurePosixPath(stray.real).is_relative_to
    return next((one.name for one in declared_environments(cluster) if inside(one.prefix)), None)


def remarks(
    target: Target[NcclSpec], state: NcclState, peers: Peers, dry: bool
) -> Iterator[tuple[str, str | None]]:
    """Copies of the right version that stay: they do no harm until one of them changes."""
    want = wanted(target, state)
    if not isinstance(want, Wanted):
        return
    reals = {one.real: None for one in state.libraries}
    wrong = {one.real for one in strays(state, want)}
    for real in reals:
        if real not in state.owned and real not in wrong:
            yield f"a second NCCL {want.upstream} lies at {real} and stays", None
