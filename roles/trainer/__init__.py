"""trainer: the trainer of this checkout in every declared environment, file for file."""

from roles.core.role import Fact, Role
from roles.trainer.converge import converge, proof
from roles.trainer.drift import drift
from roles.trainer.probe import TrainerState, parse, probe
from roles.trainer.spec import TrainerSpec


def _versions(state: TrainerState) -> str | None:
    found = {version for seen in state.environments.values() for version in seen.versions}
    return ", ".join(sorted(found)) or None


role: Role[TrainerSpec, TrainerState] = Role(
    name="trainer",
    spec=TrainerSpec,
    default=TrainerSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    proof=proof,
    needs=("environment", "pins"),
    facts=[Fact("trainer", "equal", _versions)],
)
