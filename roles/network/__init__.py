"""network: NCCL and gloo use the interface that really carries a node's address, and packets get through."""

from roles.core.role import Fact, Role
from roles.network.converge import converge
from roles.network.drift import drift, other_settings
from roles.network.probe import NetworkState, parse, probe
from roles.network.proof import proof
from roles.network.spec import NetworkSpec

__all__ = ["NetworkSpec", "NetworkState", "role"]

role: Role[NetworkSpec, NetworkState] = Role(
    name="network",
    spec=NetworkSpec,
    default=NetworkSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    facts=(
        Fact("interface", "any", lambda state: state.interface),
        Fact("MTU", "equal", lambda state: None if state.mtu is None else str(state.mtu)),
        Fact("other settings in nccl.conf", "equal", other_settings),
    ),
    proof=proof,
    crossing=True,
    proof_needs=("hosts", "ssh"),
)
