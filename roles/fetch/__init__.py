"""fetch: models and data sets of a hub, or of a directory here, lie on the shared storage once, whole and checked.

The control machine or the head fetches them with huggingface_hub; jobs name them by path.
"""

from roles.core.role import Fact, Role
from roles.fetch.converge import converge
from roles.fetch.drift import drift, fetched, remarks
from roles.fetch.probe import FetchState, parse, probe
from roles.fetch.proof import deep, proof
from roles.fetch.spec import FetchSpec

role: Role[FetchSpec, FetchState] = Role(
    name="fetch",
    spec=FetchSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    facts=(Fact("models and data", "equal", fetched),),
    needs=("storage", "environment"),
    remarks=remarks,
    proof=proof,
    deep=deep,
)
