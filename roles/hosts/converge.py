"""Writes /etc/hosts so that every name of the cluster leads to its declared address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, write_file
from roles.hosts.drift import right_text
from roles.hosts.probe import CLOUD_INIT, HostsState
from roles.hosts.spec import HostsSpec


def converge(
    target: Target[HostsSpec], state: HostsState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The file first; cloud-init is told to leave it alone."""
    text, _ = right_text(target, state, peers)
    if text != state.text + "\n":
        yield Shell(write_file("/etc/hosts", text))
    if state.cloud_init:
        yield Shell(write_file(CLOUD_INIT, "manage_etc_hosts: false\n", backup=False))
