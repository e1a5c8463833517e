"""limits: what a login may open and lock, and how large shared memory is."""

from roles.core.role import Role
from roles.limits.converge import converge
from roles.limits.drift import drift
from roles.limits.probe import LimitsState, parse, probe
from roles.limits.spec import LimitsSpec, unit_limits

__all__ = ["LimitsSpec", "LimitsState", "role", "unit_limits"]

role: Role[LimitsSpec, LimitsState] = Role(
    name="limits",
    spec=LimitsSpec,
    default=LimitsSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
)
