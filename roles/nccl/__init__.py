"""nccl: the node's NCCL packages at one exact version, pinned and held, and no other one in the loader's way."""

from roles.core.role import Fact, Role
from roles.nccl.converge import converge
from roles.nccl.drift import drift, installed, installs, remarks
from roles.nccl.probe import NcclState, parse, probe
from roles.nccl.proof import proof
from roles.nccl.spec import NcclSpec

__all__ = ["NcclSpec", "NcclState", "role"]


def _found(state: NcclState) -> str | None:
    """The version that the loader takes: the first in its cache."""
    return next((one.version or one.real for one in state.libraries if one.place == "cache"), None)


role: Role[NcclSpec, NcclState] = Role(
    name="nccl",
    spec=NcclSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=installs,
    proof=proof,
    remarks=remarks,
    needs=("packages", "environment"),
    facts=[
        Fact("NCCL package", "equal", installed),
        Fact("NCCL that the loader finds", "equal", _found),
    ],
)
