"""The line of /etc/fstab by which a node has the shared directory at its path; nothing here reaches a node.

A mount survives any order of booting: it is made when it is first used (``x-systemd.automount``), a server
that is off holds no boot up (``nofail``, ``_netdev``), and an attempt is bounded (``mount-timeout``). Writes
wait for a server that pauses and are never lost (``hard``).
"""

from __future__ import annotations

from dataclasses import dataclass

from roles.core.role import Target
from roles.storage.spec import StorageSpec, exported, server_node

OWN = "x-lockstep"
"""An option that says nothing to mount: by it Lockstep knows its lines, also under another path."""


@dataclass(frozen=True)
class Wanted:
    """A mount that the cluster file asks for. source: a server's directory, or one of this node."""

    source: str
    point: str
    kind: str
    options: tuple[str, ...]

    @property
    def line(self) -> str:
        """As /etc/fstab has it."""
        return f"{self.source} {self.point} {self.kind} {','.join(self.options)} 0 0"


def is_server(target: Target[StorageSpec]) -> bool:
    """This node is the one that serves the storage."""
    node = server_node(target.spec, target.cluster)
    return node is not None and node.name == target.node.name


def elsewhere(target: Target[StorageSpec]) -> tuple[str, str] | None:
    """The node that serves this one, and the role that has it do so."""
    node = server_node(target.spec, target.cluster)
    return (node.name, "exports") if node is not None and not is_server(target) else None


def wanted(target: Target[StorageSpec]) -> Wanted | None:
    """The mount of this node; None where nothing is to be mounted: the server's own path, another kind."""
    spec = target.spec
    if spec.kind != "nfs":
        return None
    if is_server(target):
        if exported(spec) == spec.path:
            return None
        return Wanted(exported(spec), spec.path, "none", ("bind", "nofail", OWN))
    node = server_node(spec, target.cluster)
    address = node.address if node else str(spec.server)
    host = f"[{address}]" if ":" in address else address
    options = (
        f"vers={spec.version}",
        "hard",
        "_netdev",
        "nofail",
        "x-systemd.automount",
        f"x-systemd.mount-timeout={spec.timeout}",
        *spec.options,
        OWN,
    )
    return Wanted(f"{host}:{exported(spec)}", spec.path, "nfs", options)
