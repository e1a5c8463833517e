"""Whether a node's system is one that the other roles know; where it is not, they leave it alone."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.system.oldest import (
    GLIBC,
    KERNEL,
    MACHINES,
    RELEASES,
    SYSTEMD,
    SYSTEMD_FOR_JOBS,
    older,
)
from roles.system.probe import SystemState
from roles.system.spec import SystemSpec

ALONE = "nothing is changed on this node; 'system: {manage: unmanaged}' converges it all the same"


def drift(target: Target[SystemSpec], state: SystemState, peers: Peers) -> list[Finding]:
    """Findings, none of them to be repaired: too old, of an unknown kind, without tools."""
    return list(_findings(target, state))


def _findings(target: Target[SystemSpec], state: SystemState) -> Iterator[Finding]:
    if state.manager is None or state.machine not in MACHINES:
        lacking = "neither dpkg nor rpm" if state.manager is None else state.machine
        yield Finding(
            "system-unknown",
            f"Linux with dpkg or rpm, on {' or '.join(MACHINES)}",
            f"{state.name}: {lacking}",
            f"take the node out of the cluster file: {ALONE}",
            repairable=False,
        )
        return
    old = list(_too_old(state, target.cluster.job is not None))
    if old:
        yield Finding(
            "system-too-old",
            " and ".join(want for want, _ in old) + " or newer",
            ", ".join(seen for _, seen in old),
            f"install a newer system there (README.md has the table): {ALONE}",
            repairable=False,
        )
    if state.missing:
        yield Finding(
            "system-tools",
            f"{', '.join(state.missing)} in root's PATH",
            "no such program",
            f"install what brings them (coreutils, util-linux, libc-bin or glibc-common, tar, gawk or mawk): {ALONE}",
            repairable=False,
        )


def _too_old(state: SystemState, job: bool) -> Iterator[tuple[str, str]]:
    """What is wanted and what is there, for each thing that is too old."""
    release = RELEASES.get(state.id)
    if release and state.release and older(state.release, release):
        yield f"{state.id} {release}", state.name
    if older(state.kernel, KERNEL):
        yield f"kernel {KERNEL}", f"kernel {state.kernel}"
    if state.glibc and older(state.glibc, GLIBC):
        yield f"glibc {GLIBC}", f"glibc {state.glibc}"
    least = SYSTEMD_FOR_JOBS if job else SYSTEMD
    if state.systemd is not None and state.systemd < least:
        yield f"systemd {least}{' (for a job)' if job else ''}", f"systemd {state.systemd}"
