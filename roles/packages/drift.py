"""How a node's packages differ from the cluster file."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.packages.probe import PackagesState
from roles.packages.spec import PackagesSpec


def source_text(local: str) -> str:
    """The source list that names the local repository; it is the user's own, hence trusted."""
    return f"# Written by Lockstep; changes are lost.\ndeb [trusted=yes] file:{local} ./\n"


def missing(spec: PackagesSpec, state: PackagesState) -> list[str]:
    """Wanted packages that are not wholly installed, once each, in the order of the file."""
    return [
        name
        for name in dict.fromkeys(spec.install)
        if name not in state.versions and name not in state.interrupted
    ]


def drift(target: Target[PackagesSpec], state: PackagesState, peers: Peers) -> list[Finding]:
    """Findings: interrupted package manager, wrong source list, missing packages or sources."""
    return list(_findings(target.spec, state))


def _findings(spec: PackagesSpec, state: PackagesState) -> Iterator[Finding]:
    if state.policy_left:
        yield Finding(
            "package-policy",
            "services may start",
            "an ended installation left /usr/sbin/policy-rc.d, which holds them back",
            "that file is removed",
        )
    if state.interrupted or state.journal:
        names = [f"{name} ({status})" for name, status in sorted(state.interrupted.items())]
        yield Finding(
            "package-interrupted",
            "every package wholly installed",
            f"dpkg was interrupted: {', '.join(names) or 'its journal is not empty'}",
            "dpkg --configure -a is run",
            disturbs=True,  # it may go on with a driver or a library that the job uses
        )
    absent = missing(spec, state)
    if state.manager == "rpm":
        if absent:
            yield Finding(
                "package-missing",
                f"{', '.join(absent)} installed",
                "not installed",
                f"run 'dnf install {' '.join(absent)}' on this node (Lockstep installs with apt only)",
                repairable=False,
            )
        return
    wanted = source_text(spec.local) if spec.local else None
    if (state.source or "").strip() != (wanted or "").strip() or (wanted is None) != (
        state.source is None
    ):
        yield Finding(
            "package-source",
            f"apt's source is {spec.local}" if wanted else "no source list of Lockstep's",
            "another text" if state.source is not None else "no such source list",
            "the source list is written" if wanted else "the source list is removed",
        )
    if not absent:
        return
    if state.repository in ("absent", "unindexed"):
        yield Finding(
            "package-source-missing",
            f"{spec.local} with the packages and their index, for {', '.join(absent)}",
            "no such directory" if state.repository == "absent" else "no file Packages in it",
            f"put the local repository at {spec.local} on this node, or take 'local' out of 'packages'"
            if state.repository == "absent"
            else f"run 'dpkg-scanpackages -m . > Packages' in {spec.local} (package dpkg-dev)",
            repairable=False,
        )
        return
    unknown = [name for name in absent if state.offered is not None and name not in state.offered]
    if unknown:
        yield Finding(
            "package-not-offered",
            f"{', '.join(unknown)} in {spec.local}",
            "its index does not list it",
            f"put the .deb files of {', '.join(unknown)} into {spec.local} and write its index anew",
            repairable=False,
        )
    offered = [name for name in absent if name not in unknown]
    if offered:
        yield Finding(
            "package-missing",
            f"{', '.join(offered)} installed",
            "not installed",
            f"installed from {spec.local or 'the sources of the node'}",
        )
