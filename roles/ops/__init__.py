"""ops: DeepSpeed's operators, compiled once for each kind of node; and the locks that killed builds leave.

The operators stand in the section ``environments``, under each environment's ``ops``. A training finds them
by TORCH_EXTENSIONS_DIR, and compiles nothing when it starts. Locks are looked for whatever is declared.
"""

from roles.core.role import Fact, Role
from roles.environment.spec import Environments
from roles.ops.converge import converge, proof
from roles.ops.drift import drift, first
from roles.ops.probe import OpsState, parse, probe


def _built(state: OpsState) -> str | None:
    names = {name.split("/")[0] for seen in state.environments.values() for name in seen.built}
    return ", ".join(sorted(names)) or None


role: Role[Environments, OpsState] = Role(
    name="ops",
    section="environments",
    spec=Environments,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    proof=proof,
    needs=("environment", "pins", "compiler"),
    first=first,
    facts=[Fact("operators built ahead", "equal per class", _built)],
)
