"""Which archive each environment of a node came from, and which archives lie on the shared storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import parcel
from roles.environment.fit import PROBE, Offer, offer
from roles.environment.probe import archive_of, parcel_of, stamp_values
from roles.environment.prove import STAMP
from roles.environment.spec import Environments


@dataclass(frozen=True)
class ArchivesState:
    """unpacked: environment to the SHA-256 of its archive. parcels: places that hold an archive."""

    unpacked: Mapping[str, str]
    parcels: frozenset[str]
    node: Offer = Offer()


def probe(target: Target[Environments]) -> str:
    """What the node offers, then lines ``parcel PATH`` and ``stamp NAME JSON``; ``end`` is the last."""
    parts, parcels = [], []
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        if archive:
            parcels.append(parcel_of(target.cluster, one, archive))
        stamp = quote(f"{one.prefix}/{STAMP}")
        parts.append(
            f"if [ -f {stamp} ]; then IFS= read -r l <{stamp}; printf 'stamp %s %s\\n' {one.name} \"$l\"; fi\n"
        )
    return "".join([PROBE, *parts, parcel.probe(parcels, target.cluster), "echo end\n"])


@whole
def parse(text: str) -> ArchivesState:
    """The state that ``probe`` printed."""
    unpacked: dict[str, str] = {}
    parcels: set[str] = set()
    node, rest = offer(text)
    for line in rest.split("\n"):
        word, _, value = line.partition(" ")
        if word == "parcel":
            parcels.add(value)
        elif word == "stamp":
            name, _, stamp = value.partition(" ")
            unpacked[name] = str(stamp_values(stamp).get("archive", ""))
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    return ArchivesState(unpacked, frozenset(parcels), node)
