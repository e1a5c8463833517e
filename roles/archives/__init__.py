"""archives: what the environments are unpacked from travels once: to the shared storage by way of the head,
or to one node, from which each passes it on to the next. The head removes there what its cluster uses no more.

A role of its own, so that all nodes unpack at the same time once the archive has arrived. Its time limit is
for a directory on a slow file server, of which every file is looked at.
"""

from roles.archives.converge import converge
from roles.archives.drift import drift, first
from roles.archives.probe import ArchivesState, parse, probe
from roles.core.role import Role
from roles.environment.spec import Environments

role: Role[Environments, ArchivesState] = Role(
    name="archives",
    section="environments",
    spec=Environments,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    needs=("storage",),
    first=first,
    seconds=60,
)
