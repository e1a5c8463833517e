"""What is asked of the NFS server is part of the ``storage`` section; this says which node it concerns."""

from __future__ import annotations

from roles.core.role import Target
from roles.storage.mount import is_server
from roles.storage.spec import StorageSpec, exported

FILE = "/etc/exports.d/lockstep.exports"
DROP_IN = "/etc/systemd/system/nfs-server.service.d/lockstep.conf"
UNIT = "nfs-server.service"


def serves(target: Target[StorageSpec]) -> bool:
    """This node is the declared server, and there are others to serve."""
    return is_server(target) and bool(target.others)


def squash(spec: StorageSpec) -> str:
    """The word of exports(5)."""
    return "root_squash" if spec.root_squash else "no_root_squash"


def exports_text(target: Target[StorageSpec]) -> str:
    """The file of exports: this directory, to the addresses of the other nodes alone."""
    options = f"rw,sync,no_subtree_check,{squash(target.spec)}"
    clients = " ".join(f"{node.address}({options})" for node in target.others)
    return f"# Written by Lockstep; changes are lost.\n{exported(target.spec)} {clients}\n"


def withdraws(target: Target[StorageSpec], file: str) -> bool:
    """Whether the declared exports take from clients what this file of Lockstep's gave them: its directory
    or the rights of root."""
    return not exports(target, file) or (target.spec.root_squash and ",root_squash)" not in file)


def exports(target: Target[StorageSpec], file: str | None) -> bool:
    """Whether this file of Lockstep's exports the declared directory."""
    return f"\n{exported(target.spec)} " in f"\n{file}"


def drop_in_text(spec: StorageSpec) -> str:
    """Threads are set in the kernel: the file that sets them has another name and form on every system."""
    return (
        "# Written by Lockstep; changes are lost.\n[Service]\n"
        f"ExecStartPost=/bin/sh -c 'echo {spec.threads} > /proc/fs/nfsd/threads'\n"
    )
