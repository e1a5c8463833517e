"""pdsh: usable on every node, over ssh, without complaint."""

from roles.core.role import Role
from roles.pdsh.converge import converge, package
from roles.pdsh.drift import drift
from roles.pdsh.probe import PdshState, parse, probe
from roles.pdsh.spec import PdshSpec

__all__ = ["PdshSpec", "PdshState", "role"]

role: Role[PdshSpec, PdshState] = Role(
    name="pdsh",
    spec=PdshSpec,
    default=PdshSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: package(state),
    needs=("packages",),
)
