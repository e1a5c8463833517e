"""packages: every node has the declared system packages, from the declared source."""

from roles.core.role import Fact, Role
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
    facts=(
        Fact("os", "equal per class", lambda state: state.os),
        Fact("kernel", "equal per class", lambda state: state.kernel),
        Fact("glibc", "equal per class", lambda state: state.glibc),
        Fact("system python", "equal per class", lambda state: state.python),
        Fact("gcc", "equal per class", lambda state: state.gcc),
    ),
)
