"""environment: the declared Python environments, whole, at their prefixes, proved to import and start."""

from roles.core.role import Fact, Role
from roles.environment.converge import converge, deep, proof
from roles.environment.drift import drift
from roles.environment.probe import EnvironmentState, parse, probe
from roles.environment.spec import Environments


def _fact(name: str, key: str) -> Fact[EnvironmentState]:
    def read(state: EnvironmentState) -> str | None:
        found = {
            one: seen.facts[key] for one, seen in state.environments.items() if key in seen.facts
        }
        if len(state.environments) == 1:
            return next(iter(found.values()), None)
        return ", ".join(f"{one} {value}" for one, value in sorted(found.items())) or None

    return Fact(name, "equal", read)


role: Role[Environments, EnvironmentState] = Role(
    name="environment",
    section="environments",
    spec=Environments,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    proof=proof,
    deep=deep,
    needs=("packages", "storage", "archives"),
    facts=[
        _fact("Python of the environment", "python"),
        _fact("torch", "torch"),
        _fact("deepspeed", "deepspeed"),
        _fact("transformers", "transformers"),
        _fact("protobuf", "protobuf"),
        _fact("NCCL of torch", "nccl"),
        _fact("environment hash", "environment"),
    ],
)
