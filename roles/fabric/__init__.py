"""fabric: InfiniBand ports come up, with one subnet manager; NCCL uses them on all nodes or on none."""

from roles.core.role import Fact, Role
from roles.fabric.converge import converge, installs
from roles.fabric.drift import drift
from roles.fabric.probe import FabricState, parse, probe
from roles.fabric.spec import FabricSpec

__all__ = ["FabricSpec", "FabricState", "role"]

role: Role[FabricSpec, FabricState] = Role(
    name="fabric",
    spec=FabricSpec,
    default=FabricSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=installs,
    needs=("packages",),
    facts=(Fact("InfiniBand", "equal per class", lambda state: state.summary),),
)
