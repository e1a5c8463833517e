"""What the pins of an environment would break, from the metadata of its archive and of the wheels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from inventory.cluster import Cluster
from roles.environment.archive import Archive
from roles.environment.pinned import pinned
from roles.environment.spec import Declared, normal_name, of_metadata
from roles.pins.distributions import of_wheel
from roles.pins.prove import Installed, Unmet, unmet
from roles.pins.wheels import WheelProblem, requirements_of, wheels_of


def of_archive(archive: Archive) -> dict[str, Installed]:
    """The archive's distributions by normal name."""
    found = {}
    for folder in archive.distributions:
        name, version = of_metadata(folder)
        required = tuple(archive.requires.get(folder, ()))
        found[name] = Installed(version.replace("_", "+", 1), required)
    return found


def with_pins(cluster: Cluster, one: Declared, archive: Archive) -> dict[str, Installed]:
    """The archive's distributions with the pins in place.

    What a pin from an index requires is not known here: it is judged on the node, before it is installed.
    """
    found = of_archive(archive)
    for name, version in pinned(one, archive).items():
        required: tuple[str, ...] = ()
        if one.spec.wheels is not None:
            try:
                wheel = wheels_of(cluster, one, name, version, archive.python)[0].source
                required = requirements_of(wheel)
            except WheelProblem:  # a finding of its own
                continue
            parts = of_wheel(wheel.name)
            version = parts[1] if parts else version
        found[normal_name(name)] = Installed(version, required)
    return found


def markers(archive: Archive, machine: str) -> dict[str, str]:
    """Values of the markers of requirements (PEP 508) on a node. machine: as ``uname -m`` says."""
    return {
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "python_version": archive.python,
        "python_full_version": f"{archive.python}.0",
        "implementation_version": f"{archive.python}.0",
    }


def unmet_on(
    archive: Archive, machine: str, installed: Mapping[str, Installed]
) -> tuple[Unmet, ...]:
    """The requirements that are not met on such a node, where these lie in the archive's environment."""
    return _judged(tuple(installed.items()), tuple(markers(archive, machine).items()))


@cache
def _judged(
    installed: tuple[tuple[str, Installed], ...], markers: tuple[tuple[str, str], ...]
) -> tuple[Unmet, ...]:
    """Once for the same: every node asks several times a run, and it takes a part of a second."""
    return tuple(unmet(dict(installed), dict(markers)))


def of_the_archive(archive: Archive, machine: str) -> tuple[Unmet, ...]:
    """Requirements that the archive itself does not meet: nobody's pin is to blame."""
    return unmet_on(archive, machine, of_archive(archive))


def suits(archive: Archive, name: str, version: str) -> bool:
    """Whether all distributions of the archive would take that version. name: a normal one."""
    there = {**of_archive(archive), name: Installed(version, ())}
    return all(
        each.required != name for each in unmet_on(archive, archive.needs.machine or "", there)
    )


def conflicts(cluster: Cluster, one: Declared, archive: Archive, machine: str) -> list[Unmet]:
    """Requirements that are not met because of the pins, without those that are accepted."""
    own = {(each.distribution, each.requirement) for each in of_the_archive(archive, machine)}
    after = unmet_on(archive, machine, with_pins(cluster, one, archive))
    return [
        each
        for each in after
        if (each.distribution, each.requirement) not in own and not is_accepted(one, each)
    ]


def is_accepted(one: Declared, wrong: Unmet) -> bool:
    """Whether the cluster file says that this requirement may stay unmet."""
    return (wrong.distribution, wrong.required) in one.accepted


def acceptance(one: Declared, wrong: Unmet) -> str:
    """The line of the cluster file that accepts it."""
    return one.acceptance(wrong.distribution, wrong.required)
