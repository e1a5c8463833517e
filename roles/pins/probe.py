"""Which distributions an environment has, by the names in its site-packages, and what its last check found."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import parcel
from roles.environment.pinned import installable
from roles.environment.probe import DISTRIBUTIONS, archive_of, stamp_values
from roles.environment.spec import Environments
from roles.pins.prove import CHECKED, STAMP, Unmet, key
from roles.pins.wheels import WheelProblem, pip_wheel, wheels_of


@dataclass(frozen=True)
class Site:
    """path: the environment's site-packages, empty where there is none. folders: metadata in it.

    stamp, checked: text of the environment's stamp, and of that of its last check, or empty.
    """

    path: str = ""
    folders: frozenset[str] = frozenset()
    stamp: str = ""
    checked: str = ""

    @property
    def python(self) -> str:
        """major.minor, from the path; empty where there is none."""
        return self.path.rpartition("/lib/python")[2].removesuffix("/site-packages")

    @property
    def unmet(self) -> list[Unmet] | None:
        """The requirements that are not met; None where they were not checked since a change."""
        told = stamp_values(self.checked)
        if told.get("key") != key(self.stamp, self.folders):
            return None
        try:
            return [Unmet(*map(str, each)) for each in told["unmet"]]
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class PinsState:
    """environments: by name. parcels: places that hold pip or a wheel of a pin. machine: ``uname -m``."""

    environments: Mapping[str, Site]
    parcels: frozenset[str]
    machine: str = ""


STAMPS = f"""
for f in {STAMP} {CHECKED}; do
  if [ -f "$P/$f" ]; then IFS= read -r l <"$P/$f"; printf '%s %s\\n' "$f" "$l"; fi
done
"""


def probe(target: Target[Environments]) -> str:
    """Lines ``machine NAME``, ``environment NAME``, stamps, ``site PATH``, ``d FOLDER``, ``parcel PATH``;
    ``end`` is the last."""
    parts, parcels = ["m=$(uname -m) || exit 1; printf 'machine %s\\n' \"$m\"\n"], []
    for one in target.spec.each():
        parts.append(
            f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {one.name}\n{STAMPS}{DISTRIBUTIONS}"
        )
        archive = archive_of(target.cluster, one)
        if archive:
            with suppress(WheelProblem):
                parcels.append(pip_wheel(archive.python))
        if one.spec.wheels is not None:
            for name, version in installable(one, archive).items():
                with suppress(WheelProblem):  # a finding says so
                    parcels += wheels_of(target.cluster, one, name, version, "")
    return "".join([*parts, parcel.probe(parcels, target.cluster), "echo end\n"])


@whole
def parse(text: str) -> PinsState:
    """The state that ``probe`` printed."""
    sites: dict[str, Site] = {}
    parcels: set[str] = set()
    machine = name = ""
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word == "machine":
            machine = value
        elif word == "environment":
            name = value
            sites[name] = Site()
        elif word == "parcel":
            parcels.add(value)
        elif word == "site" and name:
            sites[name] = replace(sites[name], path=value)
        elif word == STAMP and name:
            sites[name] = replace(sites[name], stamp=value)
        elif word == CHECKED and name:
            sites[name] = replace(sites[name], checked=value)
        elif word == "d" and name:
            sites[name] = replace(sites[name], folders=sites[name].folders | {value})
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    if not machine:
        raise Unreadable("the answer does not show the machine")
    return PinsState(sites, frozenset(parcels), machine)
