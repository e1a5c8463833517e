"""limits: what a login may open and lock, and how large shared memory is."""

from roles.core.role import Fact, Role
from roles.limits.converge import converge
from roles.limits.drift import drift, reading, shm_size
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
    facts=(
        Fact("open files", "any", reading("nofile")),
        Fact("locked memory", "any", reading("memlock")),
        Fact("/dev/shm", "any", shm_size),
    ),
)
