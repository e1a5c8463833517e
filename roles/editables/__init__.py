"""editables: distributions of an environment that are installed from their source, as by ``pip install -e``.

The source is a folder on the control machine; it lies in the environment on every node, the same on all.
An editable install of the archive whose source did not travel with it is named.
"""

from roles.core.role import Fact, Role
from roles.editables.converge import converge, proof
from roles.editables.drift import drift, sources_of
from roles.editables.probe import EditablesState, parse, probe
from roles.environment.spec import Environments

role: Role[Environments, EditablesState] = Role(
    name="editables",
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
    facts=[Fact("editable sources", "equal", sources_of)],
)
