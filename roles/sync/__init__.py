"""sync: directories below storage that is each node's own hold the same on every node, file by file.

They come from the control machine or from one node, and from each node that has them to the next.
"""

from roles.core.role import Fact, Role
from roles.storage.spec import StorageSpec
from roles.sync.converge import converge, deep
from roles.sync.declared import entries
from roles.sync.drift import contents, drift
from roles.sync.probe import SECONDS, SyncState, parse, probe

role: Role[StorageSpec, SyncState] = Role(
    name="sync",
    section="storage",
    spec=StorageSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: ["rsync"] if entries(target.cluster) else [],
    needs=("packages", "storage", "fetch"),
    seconds=SECONDS,
    facts=(Fact("synchronised files", "equal", contents),),
    deep=deep,
)
