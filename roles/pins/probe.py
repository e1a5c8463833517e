"""Which distributions an environment has, read from the names in its site-packages."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import parcel
from roles.environment.probe import DISTRIBUTIONS, archive_of
from roles.environment.spec import Declared, Environments
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of


@dataclass(frozen=True)
class Site:
    """path: the environment's site-packages, empty where there is none. folders: metadata in it."""

    path: str
    folders: frozenset[str]

    @property
    def python(self) -> str:
        """major.minor, from the path; empty where there is none."""
        return self.path.rpartition("/lib/python")[2].removesuffix("/site-packages")


@dataclass(frozen=True)
class PinsState:
    """environments: by name, those with pins. parcels: places that hold a wheel of a pin."""

    environments: Mapping[str, Site]
    parcels: frozenset[str]


def pinned(spec: Environments) -> list[Declared]:
    """The environments that have pins."""
    return [one for one in spec.each() if one.spec.pins]


def probe(target: Target[Environments]) -> str:
    """Lines ``environment NAME``, ``site PATH``, ``d FOLDER``, ``parcel PATH``; ``end`` is the last."""
    parts, parcels = [], []
    for one in pinned(target.spec):
        parts.append(
            f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {one.name}\n{DISTRIBUTIONS}"
        )
        archive = archive_of(target.cluster, one)
        if archive:
            with suppress(WheelProblem):
                parcels.append(pip_wheel(archive.python))
        if one.spec.wheels is not None:
            for name in one.spec.pins:
                with suppress(WheelProblem):  # a finding says so
                    parcels += wheels_of(target.cluster, one, name, "")
    return "".join([*parts, parcel.probe(parcels, target.cluster), "echo end\n"])


@whole
def parse(text: str) -> PinsState:
    """The state that ``probe`` printed."""
    paths: dict[str, str] = {}
    folders: dict[str, set[str]] = {}
    parcels: set[str] = set()
    name = ""
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word == "environment":
            name = value
            paths[name], folders[name] = "", set()
        elif word == "parcel":
            parcels.add(value)
        elif word == "site" and name:
            paths[name] = value
        elif word == "d" and name:
            folders[name].add(value)
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    sites = {one: Site(path, frozenset(folders[one])) for one, path in paths.items()}
    return PinsState(sites, frozenset(parcels))
