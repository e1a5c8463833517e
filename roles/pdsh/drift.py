"""How pdsh on a node differs from what a launcher needs."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.packages.managers import Manager
from roles.packages.spec import PackagesSpec
from roles.pdsh.probe import DEBIAN_DEFAULT, RPM_DEFAULT, Entry, PdshState
from roles.pdsh.spec import PdshSpec


def default_file(target: Target[PdshSpec], state: PdshState) -> tuple[str, str]:
    """Path and text of the file that makes the declared remote shell pdsh's default."""
    if state.dialect == "deb":
        return DEBIAN_DEFAULT, f"{target.spec.rcmd}\n"
    return RPM_DEFAULT, f"export PDSH_RCMD_TYPE={target.spec.rcmd}\n"


def manager_of(state: PdshState) -> Manager:
    """What installs packages there."""
    return "apt" if state.dialect == "deb" else "rpm"


def insecure(state: PdshState) -> list[Entry]:
    """What pdsh refuses on the way to its modules."""
    return [entry for entry in state.path if entry.insecure]


def packages_for_repair(target: Target[PdshSpec]) -> PackagesSpec | None:
    """The declared source to install pdsh from again; None where Lockstep may not install."""
    packages = target.cluster.section("packages", PackagesSpec)
    return packages if packages is not None and packages.manage == "managed" else None


def drift(target: Target[PdshSpec], state: PdshState, peers: Peers) -> list[Finding]:
    """Findings: pdsh missing, another default shell, a way to the modules that pdsh refuses."""
    return list(_findings(target, state))


def _findings(target: Target[PdshSpec], state: PdshState) -> Iterator[Finding]:
    rcmd = target.spec.rcmd
    if state.version is None:
        packages = packages_for_repair(target)
        coming = packages is not None and "pdsh" in packages.names(manager_of(state))
        yield Finding(
            "pdsh-missing",
            "pdsh installed",
            "no such program",
            "the packages role installs it"
            if coming
            else "name pdsh under 'packages: install', or set 'pdsh: {manage: unmanaged}' and use another launcher",
            repairable=False,
        )
        return
    path, text = default_file(target, state)
    right = (state.default or "").strip() == text.strip()
    already = state.dialect == "rpm" and state.default is None and state.chosen == rcmd
    if not right and not already:
        yield Finding(
            "pdsh-default",
            f"{rcmd} as pdsh's default remote shell",
            f"{state.default!r} in {path}" if state.default is not None else f"no {path}",
            f"{path} is written",
        )
    wrong = insecure(state)
    if wrong:
        yield Finding(
            "pdsh-owner",
            "the way to pdsh's modules owned by root and not writable by all",
            "; ".join(f"{entry.path} of uid {entry.uid}, mode {entry.mode:04o}" for entry in wrong),
            "their owner is set to root, and the others' right to write is taken",
        )
        return  # pdsh complains of these; what remains shows in the next look
    seen = list(state.complaints)
    if rcmd not in state.modules:
        seen.append(f"its modules are {', '.join(state.modules) or 'none'}")
    elif state.dialect == "deb" and right and state.chosen != rcmd:
        seen.append(f"it takes {state.chosen or 'no remote shell'}, although {path} says {rcmd}")
    if seen:
        repairable = packages_for_repair(target) is not None
        yield Finding(
            "pdsh-modules",
            f"pdsh takes {rcmd} and has no complaint",
            "; ".join(seen),
            "pdsh is unpacked again"
            if repairable
            else "install the pdsh package of this node again",
            repairable=repairable,
        )
