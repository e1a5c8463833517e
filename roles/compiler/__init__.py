"""compiler: gcc, ninja and Python's headers, for the extensions that torch and DeepSpeed build on the nodes."""

from roles.compiler.converge import converge, installs, proof
from roles.compiler.drift import drift
from roles.compiler.probe import CompilerState, parse, probe
from roles.compiler.spec import CompilerSpec
from roles.core.role import Fact, Role


def _version(state: CompilerState) -> str | None:
    """Of the C++ compiler that a login finds: it is the one that builds extensions."""
    return state.tools["c++"].version if "c++" in state.tools else None


__all__ = ["CompilerSpec", "CompilerState", "role"]

role: Role[CompilerSpec, CompilerState] = Role(
    name="compiler",
    spec=CompilerSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=installs,
    needs=("packages",),
    facts=(Fact("gcc", "equal per class and os", _version),),
    proof=proof,
)
