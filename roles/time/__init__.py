"""time: chrony keeps one clock for all nodes; the head's, which may follow time servers."""

from roles.core.role import Fact, Role
from roles.time.converge import converge
from roles.time.drift import clock, drift, offset, remarks
from roles.time.probe import TimeState, parse, probe
from roles.time.proof import proof
from roles.time.spec import TimeSpec

__all__ = ["TimeSpec", "TimeState", "role"]

role: Role[TimeSpec, TimeState] = Role(
    name="time",
    spec=TimeSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=lambda target, state: ["chrony"],
    needs=("packages",),
    facts=(Fact("clock", "equal", clock), Fact("clock offset", "any", offset)),
    head_first=True,
    proof=proof,
    crossing=True,
    proof_needs=("hosts", "ssh"),
    remarks=remarks,
)
