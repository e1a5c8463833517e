"""How a node's packages and their sources differ from the cluster file."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.packages.bundle import HOME, INDEX, Entry, packages_for, systems
from roles.packages.managers import KEYS, SOURCES
from roles.packages.probe import PackagesState
from roles.packages.sources import digest, key_texts, source_text
from roles.packages.spec import PackagesSpec
from roles.packages.unattended import APT_FENCE, APT_TEXT, lacking

_INDEXING = {
    "apt": (
        "no file Packages in it",
        "run 'dpkg-scanpackages -m . > Packages' in {} (package dpkg-dev)",
    ),
    "rpm": ("no repodata/repomd.xml in it", "run 'createrepo_c {}'"),
}


def missing(spec: PackagesSpec, state: PackagesState) -> list[str]:
    """Wanted packages that are not wholly installed, once each, in the order of the file."""
    return [
        name
        for name in spec.names(state.manager)
        if name not in state.versions and name not in state.interrupted
    ]


def offered(spec: PackagesSpec, state: PackagesState) -> list[str]:
    """Those of them that the sources may have: all, unless the local repository is the only one."""
    alone = state.offered is not None and not spec.sources_of(state.manager)
    return [n for n in missing(spec, state) if not alone or n in (state.offered or ())]


def unfenced(state: PackagesState) -> dict[str, str]:
    """Tools that upgrade packages by themselves, kernel and driver too: file to its list."""
    return {
        file: listed
        for file, listed in state.unattended.items()
        if (
            listed != " ".join(APT_TEXT.split("\n")).strip()
            if file == APT_FENCE
            else lacking(listed)
        )
    }


def drift(target: Target[PackagesSpec], state: PackagesState, peers: Peers) -> list[Finding]:
    """Findings: interrupted package manager, wrong sources or keys, missing packages, upgrades at will."""
    return list(_findings(target, state))


def _findings(target: Target[PackagesSpec], state: PackagesState) -> Iterator[Finding]:
    spec = target.spec
    if state.policy_left:
        yield Finding(
            "package-policy",
            "services may start",
            "an ended installation left /usr/sbin/policy-rc.d, which holds them back",
            "that file is removed",
        )
    if state.interrupted or state.cut:
        names = [f"{name} ({status})" for name, status in sorted(state.interrupted.items())]
        dpkg = state.manager == "apt"
        yield Finding(
            "package-interrupted",
            "every package wholly installed",
            f"an installation was interrupted: {', '.join([*names, *([state.cut] if state.cut else [])])}",
            "dpkg --configure -a is run"
            if dpkg
            else "rpm's database is rebuilt, second versions go, and what lost files is installed again",
            disturbs=True,  # it may go on with a driver or a library that the job uses
        )
    wanted = source_text(spec, state.manager)
    if (state.source or "").strip() != (wanted or "").strip() or (wanted is None) != (
        state.source is None
    ):
        file = SOURCES[state.manager]
        yield Finding(
            "package-source",
            f"the declared sources in {file}" if wanted else f"no {file}",
            "another text" if state.source is not None else "no such file",
            "it is written" if wanted else "it is removed",
        )
    keys = {
        name: digest(text) for name, text in key_texts(spec, state.manager, target.cluster).items()
    }
    if keys != state.keys:
        differing = sorted(n for n in {*keys, *state.keys} if keys.get(n) != state.keys.get(n))
        yield Finding(
            "package-source-key",
            f"the declared sources' keys in {KEYS[state.manager]}",
            ", ".join(
                f"{name}: {'left over' if name not in keys else 'missing' if name not in state.keys else 'another key'}"
                for name in differing
            ),
            "they are written, and what is left over is removed",
        )
    gap = _bundle(target, state)
    if gap is None:
        yield from _absent(spec, state)
    else:  # what is missing shows when the repository is there
        yield gap
    if spec.unattended == "fence" and (open_ones := unfenced(state)):
        yield Finding(
            "package-unattended",
            "kernel, driver, CUDA and NCCL left out of unattended upgrades",
            f"not left out in {', '.join(open_ones)}",
            "they are added to its list; 'packages: {unattended: leave}' would leave it",
        )


def bundled(target: Target[PackagesSpec], state: PackagesState) -> dict[str, Entry]:
    """The files that the declared bundle has for this node, the index last; none where there are none."""
    if target.spec.bundle is None:
        return {}
    folder = target.cluster.at_hand(target.spec.bundle)
    return packages_for(folder, state.system, state.manager)


def _bundle(target: Target[PackagesSpec], state: PackagesState) -> Finding | None:
    if target.spec.bundle is None:
        return None
    folder = target.cluster.at_hand(target.spec.bundle)
    files = bundled(target, state)
    index = INDEX[state.manager]
    if index not in files:
        has = f"those for {', '.join(systems(folder)) or 'no system'}"
        return Finding(
            "package-bundle",
            f"packages for {state.system} in the bundle {folder}",
            f"its manifest does not name their {index}" if files else f"it has {has}",
            "run 'lockstep bundle' again where the nodes' sources can be reached",
            repairable=False,
        )
    count = sum("/" not in name and name != index for name in files)
    if state.index == files[index].sha256 and state.files >= count:
        return None
    return Finding(
        "package-bundle",
        f"the {count} packages of the bundle in {HOME}",
        "no repository there"
        if state.index is None
        else "those of another bundle"
        if state.index != files[index].sha256
        else f"{state.files} of them",
        "those that lack are brought there",
    )


def _absent(spec: PackagesSpec, state: PackagesState) -> Iterator[Finding]:
    absent = missing(spec, state)
    if state.cut and state.manager == "rpm" and not state.versions:
        return  # the database could not be read; what is missing shows when it is mended
    if not absent:
        return
    if state.repository in ("absent", "unindexed"):
        lacks, fix = _INDEXING[state.manager]
        yield Finding(
            "package-source-missing",
            f"{spec.local} with the packages and their index, for {', '.join(absent)}",
            "no such directory" if state.repository == "absent" else lacks,
            f"put the local repository at {spec.local} on this node, or take 'local' out of 'packages'"
            if state.repository == "absent"
            else fix.format(spec.local),
            repairable=False,
        )
        return
    offers = offered(spec, state)
    unknown = [name for name in absent if name not in offers]
    if unknown:
        suffix = ".deb files" if state.manager == "apt" else "RPMs"
        yield Finding(
            "package-not-offered",
            f"{', '.join(unknown)} in {spec.local}",
            "its index does not list it",
            f"put the {suffix} of {', '.join(unknown)} into {spec.local} and write its index anew",
            repairable=False,
        )
    if offers:
        yield Finding(
            "package-missing",
            f"{', '.join(offers)} installed",
            "not installed",
            f"installed from {spec.origin(state.manager)}",
        )
