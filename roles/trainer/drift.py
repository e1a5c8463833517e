"""How the trainer in an environment differs from the control machine's."""

from __future__ import annotations

from roles.core.role import Finding, Peers, Target
from roles.environment.spec import Declared
from roles.trainer.package import Package, package
from roles.trainer.probe import Seen, TrainerState, declared
from roles.trainer.spec import TrainerSpec


def drift(target: Target[TrainerSpec], state: TrainerState, peers: Peers) -> list[Finding]:
    """Findings of every environment."""
    own = package()
    found = (
        difference(one, state.environments.get(one.name, Seen()), own) for one in declared(target)
    )
    return [finding for finding in found if finding]


def difference(one: Declared, seen: Seen, own: Package) -> Finding | None:
    """What is wrong with the trainer in one environment; at most one thing, for one step mends all."""
    want = f"trainer {own.version} in {one.prefix}"

    def found(id: str, what: str) -> Finding:
        return Finding(id, want, what, "the trainer's wheel is installed", disturbs=True)

    if seen.foreign:
        return Finding(
            "trainer-foreign",
            want,
            f"another package of that name: {seen.foreign.removesuffix('.dist-info')}",
            f"take it out of the environment (pip uninstall trainer) before packing {one.name}",
            repairable=False,
        )
    if not seen.versions:
        return found("trainer-missing", "none")
    if seen.versions != {own.version}:
        return found("trainer-version", " and ".join(sorted(seen.versions)))
    changed = sorted(
        name for name in {*own.files, *seen.files} if own.files.get(name) != seen.files.get(name)
    )
    if changed:
        return found("trainer-edited", f"changed there: {', '.join(changed)}")
    return None
