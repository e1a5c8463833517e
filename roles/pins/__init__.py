"""pins: exact versions of single distributions in an environment, put there from offline wheels or an index.

The pins stand in the section ``environments``. torch is never among them.
"""

from roles.core.role import Role
from roles.environment.spec import Environments
from roles.pins.converge import converge, proof
from roles.pins.drift import drift
from roles.pins.probe import PinsState, parse, probe

role: Role[Environments, PinsState] = Role(
    name="pins",
    section="environments",
    spec=Environments,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    proof=proof,
    needs=("environment",),
    head_first=True,
)
