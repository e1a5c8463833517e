"""packages: every node has the declared system packages, from the declared source."""

from roles.core.role import Role
from roles.packages.converge import converge
from roles.packages.drift import drift
from roles.packages.probe import PackagesState, parse, probe
from roles.packages.spec import PackagesSpec

__all__ = ["PackagesSpec", "PackagesState", "role"]

role: Role[PackagesSpec, PackagesState] = Role(
    name="packages",
    spec=PackagesSpec,
    default=PackagesSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: target.spec.names(state.manager),
)
