"""How the declared services differ from such that run now and after each boot."""

from __future__ import annotations

from collections.abc import Iterator

from roles.core.role import Finding, Peers, Target
from roles.services.probe import ServicesState, Unit
from roles.services.spec import ServicesSpec

STARTED_AT_BOOT = {"enabled", "static", "indirect", "generated", "alias"}
"""States of unit files that are as their package wants them: not all are enabled by themselves."""


def runs(unit: Unit) -> bool:
    """It runs, or has done what it is for: a oneshot need not stay."""
    done = unit.kind == "oneshot" and unit.active == "inactive" and unit.result == "success"
    return unit.active == "active" or done


def drift(target: Target[ServicesSpec], state: ServicesState, peers: Peers) -> list[Finding]:
    """Findings: a service that is not there, may not run, does not run, or will not after a boot."""
    return [found for name in target.spec.running for found in _of(name, state.unit(name))]


def _of(name: str, unit: Unit) -> Iterator[Finding]:
    if unit.load == "masked":
        yield Finding(
            "service-masked",
            f"{name} may run",
            "it is masked",
            f"run 'systemctl unmask {name}' there, or take it out of services.running",
            repairable=False,
        )
    elif unit.load != "loaded":
        yield Finding(
            "service-missing",
            f"{name}, known to systemd",
            "no such unit"
            if unit.load == "not-found"
            else f"a unit that it cannot read ({unit.load})",
            "it comes with its package where packages.install names that; else name it there, or take the service "
            "out of services.running"
            if unit.load == "not-found"
            else f"see systemctl status {name}",
            repairable=False,
        )
    elif unit.file not in STARTED_AT_BOOT or not runs(unit):
        seen = f"{unit.active} ({unit.sub}), {unit.file or 'without a file'}"
        if unit.result not in ("", "success"):
            seen += f", last result {unit.result}"
        yield Finding(
            "service-stopped",
            f"{name} runs now and after each boot",
            seen,
            "it is enabled and started",
        )
