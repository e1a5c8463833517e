"""Nothing is ever changed: a system is made newer by its owner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Step
from roles.system.probe import SystemState
from roles.system.spec import SystemSpec


def converge(
    target: Target[SystemSpec], state: SystemState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """No step: none of the findings is repairable."""
    return iter(())
