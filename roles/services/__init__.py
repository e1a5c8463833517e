"""services: what the file names runs now, and after every boot."""

from roles.core.role import Role
from roles.services.converge import converge
from roles.services.drift import drift
from roles.services.probe import ServicesState, parse, probe
from roles.services.spec import ServicesSpec

__all__ = ["ServicesSpec", "ServicesState", "role"]

role: Role[ServicesSpec, ServicesState] = Role(
    name="services",
    spec=ServicesSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    needs=("packages",),
)
