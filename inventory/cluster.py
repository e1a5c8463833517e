"""The cluster file as typed values: nodes, how they are reached, and one section a role.

The sections' own models belong to the roles; whoever loads the file hands them in, so that the
arrow between the packages points one way (roles know the inventory, never the reverse).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from inventory.base import Address, GpuClass, InterfaceName, NodeName, Port, Spec, Strict, UserName
from inventory.sentences import nearest

S = TypeVar("S", bound=Spec)


class Sudo(Strict):
    """How the login user becomes root when sudo asks for a password.

    password_file: a file on the control machine, mode 0600, whose first line is the password.
    """

    password_file: Path


class Ssh(Spec):
    """How the control machine reaches a node; a node's own ``ssh:`` overrides single keys.

    user: login user; root, or one that may use sudo.
    port: where sshd listens (1 to 65535).
    key: private key on the control machine; None leaves the choice to the agent and ~/.ssh.
    sudo: False for root, True for sudo without a password, or a password file.
    known_hosts: the pinned host keys; None means Lockstep's own file for this cluster.
    """

    user: UserName = "root"
    port: Port = 22
    key: Path | None = None
    sudo: bool | Sudo = False
    known_hosts: Path | None = None


class NodeEntry(Strict):
    """What the cluster file says under one node's name.

    address: the address that its peers use for rendezvous and data.
    ssh: what differs from the cluster's ``ssh``.
    gpus: number of GPUs that the node must show; 0 means a node without GPUs.
    gpu_class: nodes of one class must have the same driver (for example ``a100``).
    interface: the interface that carries the address; None means: found on the node.
    local: the control machine is this node.
    """

    address: Address
    ssh: Ssh = Ssh()
    gpus: int = Field(default=0, ge=0)
    gpu_class: GpuClass | None = None
    interface: InterfaceName | None = None
    local: bool = False


class Node(NodeEntry):
    """One machine, with its name and with the cluster's ``ssh`` already merged in."""

    name: NodeName


@dataclass(frozen=True)
class Cluster:
    """A whole cluster file, checked.

    nodes are in the order of the file, which is the order of ranks; the first is the head.
    sections maps a section's key in the file to the spec that its role declared; a section that
    the file leaves out has its default, or is absent when the role has none.
    options: what the user asked of this run alone (``--data KEY=VALUE``); not in the file.
    """

    name: str
    path: Path
    nodes: Mapping[str, Node]
    ssh: Ssh = field(default_factory=Ssh)
    sections: Mapping[str, Spec] = field(default_factory=dict)
    job: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def head(self) -> Node:
        """The first node: it holds the cluster key and the rendezvous."""
        return next(iter(self.nodes.values()))

    @property
    def known_hosts(self) -> Path:
        """Where the control machine pins the nodes' host keys."""
        from inventory.settings import state_directory

        return self.ssh.known_hosts or state_directory() / self.name / "known_hosts"

    def no_node(self, name: str) -> str:
        """The sentence about a name that none of its nodes has."""
        near = nearest(name, self.nodes)
        hint = f"did you mean {near}?" if near else f"its nodes are {', '.join(self.nodes)}"
        return f"{self.path} declares no node {name!r}: {hint}"

    def at_hand(self, path: Path | str) -> Path:
        """A path of the file as an absolute path on the control machine.

        An unknown home directory (``~nobody/x``) stays as written: no file is there, as the reader tells.
        """
        path = Path(path)
        with contextlib.suppress(RuntimeError):
            path = path.expanduser()
        return (self.path.parent / path).absolute()

    def section(self, key: str, kind: type[S]) -> S | None:
        """The section under that key, or None if the file does not declare it."""
        found = self.sections.get(key)
        return found if isinstance(found, kind) else None
