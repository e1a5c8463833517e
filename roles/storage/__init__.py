"""storage: one directory that every node sees under the same path, mounted where that is declared, and the
proof that it is one."""

from roles.core.role import Fact, Role
from roles.storage.converge import client_packages, converge
from roles.storage.drift import drift
from roles.storage.mount import elsewhere
from roles.storage.probe import StorageState, parse, probe
from roles.storage.proof import proof
from roles.storage.spec import StorageSpec, depot, shared_path

__all__ = ["depot", "role", "shared_path"]

role: Role[StorageSpec, StorageState] = Role(
    name="storage",
    spec=StorageSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: client_packages(state) if target.spec.kind == "nfs" else [],
    needs=("packages", "exports"),
    elsewhere=elsewhere,
    seconds=20,
    facts=(Fact("shared storage", "equal", lambda state: state.mark.id if state.mark else None),),
    head_first=True,
    proof=proof,
    crossing=True,
    proof_needs=("hosts", "ssh"),
)
