"""How the server's exports differ from the directory that the cluster's other nodes are to mount."""

from __future__ import annotations

import re
from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.exports.probe import ExportsState
from roles.exports.spec import (
    DROP_IN,
    FILE,
    drop_in_text,
    exports,
    exports_text,
    serves,
    squash,
    withdraws,
)
from roles.storage.spec import StorageSpec, exported

KERNELS = re.compile(
    r"autofs|binfmt_misc|bpf|cgroup2?|configfs|debugfs|devpts|devtmpfs|fuse.*|hugetlbfs|mqueue|nfsd|nsfs|overlay"
    r"|proc|pstore|ramfs|rpc_pipefs|securityfs|squashfs|sysfs|tmpfs|tracefs"
)
"""File systems that hold nothing of the shared data: of the kernel, of containers, in memory."""


def drift(target: Target[StorageSpec], state: ExportsState, peers: Peers) -> list[Finding]:
    """Findings: on a server with others to serve what is missing or otherwise; elsewhere what was left."""
    if not serves(target):
        return list(_left(state))
    there = [*_nested(target, state), *_files(target, state), *_running(target, state)]
    return list(_directory(target, state)) or there


def _left(state: ExportsState) -> Iterator[Finding]:
    if state.file is not None or state.drop_in is not None:
        yield Finding(
            "nfs-exports-left",
            "no exports of Lockstep's where no other node is to mount them",
            FILE if state.file is not None else DROP_IN,
            "they are withdrawn",
            disturbs=True,
            shared=True,
        )


def _directory(target: Target[StorageSpec], state: ExportsState) -> Iterator[Finding]:
    if not state.directory and exports(target, state.file):
        yield Finding(
            "export-missing",
            f"{exported(target.spec)}, which this node has exported before",
            "no such directory",
            "mount the disk that holds it; if a new directory is meant, create it",
            repairable=False,
        )


def _nested(target: Target[StorageSpec], state: ExportsState) -> Iterator[Finding]:
    """An export ends where another file system begins; what is hidden (snapshots) is nobody's data.

    A client of NFS 3 stays in the file system that it mounted, unless what lies below is exported with nohide.
    """
    points = [
        f"{point} ({kind})"
        for kind, point in state.nested
        if not KERNELS.fullmatch(kind) and "/." not in point
    ]
    if points:
        directory = exported(target.spec)
        how = ", with nohide" if target.spec.version == "3" else ""
        yield Finding(
            "export-nested",
            f"all that lies below {directory} on its own file system, or exported itself{how}",
            f"{', '.join(points)}, which the other nodes see as an empty directory",
            f"export it too{how}, by a line of your own in /etc/exports.d and exportfs -ra, or mount it apart "
            f"from {directory}",
            repairable=False,
        )


def _files(target: Target[StorageSpec], state: ExportsState) -> Iterator[Finding]:
    spec = target.spec
    if not state.directory:
        yield Finding(
            "export-missing",
            f"{exported(spec)}, to export",
            "no such directory",
            "it is made, empty and root's",
        )
    if not state.installed:
        yield Finding("nfs-server-missing", "an NFS server", "not installed", "it is installed")
    if state.file != exports_text(target):
        yield Finding(
            "nfs-exports",
            f"{FILE} with {exported(spec)} for the cluster's addresses",
            "no such file" if state.file is None else "another text",
            "the file is written and read by the server",
            disturbs=state.file is not None and withdraws(target, state.file),
            shared=True,
        )
    if state.drop_in != drop_in_text(spec):
        yield Finding(
            "nfs-threads",
            f"{spec.threads} threads at each start of the NFS server",
            "no such setting" if state.drop_in is None else "another number",
            "it is set",
        )


def _running(target: Target[StorageSpec], state: ExportsState) -> Iterator[Finding]:
    if not state.installed:
        return
    spec = target.spec
    if state.enabled != "enabled" or state.active != "active":
        yield Finding(
            "nfs-server-stopped",
            "an NFS server that runs now and after a reboot",
            ", ".join(word for word in (state.active, state.enabled) if word) or "no such service",
            "it is started and enabled",
        )
        return
    if state.threads != spec.threads and state.drop_in == drop_in_text(spec):
        yield Finding(
            "nfs-threads",
            f"{spec.threads} threads of the NFS server",
            str(state.threads),
            "their number is changed while it runs",
        )
    wanted = {node.address for node in target.others}
    others = sorted(set(state.clients) - wanted)
    if others and state.file == exports_text(target):
        yield Finding(
            "nfs-exported-to-others",
            f"{exported(spec)} exported to the cluster's addresses alone",
            f"to {', '.join(others)} too",
            f"take {exported(spec)} out of {' and '.join(state.elsewhere)}, and run exportfs -ra"
            if state.elsewhere
            else "the server reads its files again, none of which names them",
            repairable=not state.elsewhere,
        )
    wrong = [
        address
        for address in sorted(wanted)
        if not {"rw", squash(spec)} <= set(state.clients.get(address, ()))
    ]
    if wrong and state.file == exports_text(target):
        yield Finding(
            "nfs-exports",
            f"{exported(spec)} exported now, rw and {squash(spec)}, to {', '.join(wrong)}",
            f"otherwise, and {' and '.join(state.elsewhere)} names it too: take it out there"
            if state.elsewhere
            else "not, or otherwise",
            "the server reads its files again",
        )
