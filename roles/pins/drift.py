"""How the distributions of an environment differ from its pins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from roles.core.role import Finding, Peers, Target
from roles.environment.parcel import Parcel
from roles.environment.spec import Declared, Environments, normal_name, of_metadata
from roles.pins.distributions import installed, meets
from roles.pins.probe import PinsState, Site, pinned
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of


@dataclass(frozen=True)
class Wrong:
    """One pin that is not met.

    folders: its metadata that must go. twice: there is more than one, so pip could not tell which
    files are whose. wheels: what it is installed from;
    empty for an index.
    """

    name: str
    version: str
    folders: tuple[str, ...]
    twice: bool
    wheels: tuple[Parcel, ...]
    finding: Finding


def drift(target: Target[Environments], state: PinsState, peers: Peers) -> list[Finding]:
    """Findings of every pin of every environment."""
    return [wrong.finding for one in pinned(target.spec) for wrong in wrongs(target, state, one)]


def wrongs(target: Target[Environments], state: PinsState, one: Declared) -> Iterator[Wrong]:
    """The pins of one environment that are not met."""
    site = state.environments.get(one.name, Site("", frozenset()))
    present = installed(site.folders)
    for name, pin in one.spec.pins.items():
        found = _difference(name, pin, present)
        if found is None:
            continue
        id, seen, folders = found
        wheels: tuple[Parcel, ...] = ()
        described = f"{name} {pin} in {one.prefix}"
        finding = Finding(id, described, seen, "it is installed, with nothing else", disturbs=True)
        try:
            if site.path:
                pip_wheel(site.python)
            if one.spec.wheels is not None:
                wheels = tuple(wheels_of(target.cluster, one, name, site.python))
        except WheelProblem as error:
            fix = f"put the wheel there, or correct environments.{one.name}.pins; {error}"
            finding = Finding("pin-wheel", described, seen, fix, repairable=False)
        yield Wrong(name, pin, folders, id == "pin-duplicate", wheels, finding)


def _difference(
    name: str, pin: str, present: Mapping[str, list[str]]
) -> tuple[str, str, tuple[str, ...]] | None:
    """(finding id, what is there, metadata folders that must go), or None where the pin is met."""
    folders = present.get(normal_name(name), [])
    versions = [of_metadata(folder)[1] for folder in folders]
    if len(folders) > 1:
        right = [folder for folder in folders if meets(of_metadata(folder)[1], pin)]
        strays = tuple(folder for folder in folders if folder not in right[:1])
        return "pin-duplicate", f"{len(folders)} versions at once: {', '.join(versions)}", strays
    if not folders:
        return "pin-version", "not installed", ()
    if not meets(versions[0], pin):
        return "pin-version", versions[0] or "an unknown version", tuple(folders)
    return None
