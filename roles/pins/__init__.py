"""pins: exact versions of single distributions in an environment, put there from offline wheels or an index.

The pins stand in the section ``environments``. torch is never among them. What the archive requires and
has lost to another distribution's files (nvidia-nccl-cu12 to -cu11) counts as pinned. A pin that would break what
another distribution requires is refused before anything is changed; afterwards, the requirements of all
distributions are checked in the environment itself.
"""

from roles.core.role import Fact, Role
from roles.environment.spec import Environments
from roles.pins.converge import converge, proof
from roles.pins.drift import drift, remarks, unmet_of
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
    proof_needs=("editables",),
    head_first=True,
    remarks=remarks,
    facts=[Fact("requirements not met", "equal", unmet_of)],
)
