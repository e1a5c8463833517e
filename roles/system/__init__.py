"""system: the gate before all other roles; a node whose system they do not know is named and left alone."""

from roles.core.role import Fact, Role
from roles.system.converge import converge
from roles.system.drift import drift
from roles.system.probe import SystemState, parse, probe
from roles.system.spec import SystemSpec

__all__ = ["SystemSpec", "SystemState", "role"]

role: Role[SystemSpec, SystemState] = Role(
    name="system",
    spec=SystemSpec,
    default=SystemSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    gate=True,
    facts=(
        Fact("os", "any", lambda state: state.name, is_os=True),
        Fact("kernel", "equal per class and os", lambda state: state.kernel),
        Fact("glibc", "equal per class and os", lambda state: state.glibc),
        Fact("system python", "equal per class and os", lambda state: state.python),
        Fact("gcc", "equal per class and os", lambda state: state.gcc),
    ),
)
