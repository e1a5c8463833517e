"""hosts: every node's name leads to its declared address, on every node."""

from roles.core.role import Role
from roles.hosts.converge import converge
from roles.hosts.drift import drift
from roles.hosts.probe import HostsState, parse, probe
from roles.hosts.spec import HostsSpec

role: Role[HostsSpec, HostsState] = Role(
    name="hosts",
    spec=HostsSpec,
    default=HostsSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
)
