"""exports: the node that the storage section names as server gives its directory to the other nodes by NFS.

A role of its own, so that the directory is exported before any node mounts it.
"""

from roles.core.role import Role
from roles.exports.converge import converge, server_packages
from roles.exports.drift import drift
from roles.exports.probe import ExportsState, parse, probe
from roles.exports.spec import serves
from roles.storage.spec import StorageSpec

role: Role[StorageSpec, ExportsState] = Role(
    name="exports",
    section="storage",
    spec=StorageSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: server_packages(state) if serves(target) else [],
    needs=("packages",),
)
