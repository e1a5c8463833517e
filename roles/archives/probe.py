"""Which archives the node has unpacked, which lie where it finds them, and keys of past transfers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from roles.archives import depot, taking
from roles.core import relay
from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import parcel
from roles.environment.fit import PROBE, Offer, offer
from roles.environment.probe import archive_of, parcel_of, stamp_values
from roles.environment.prove import STAMP
from roles.environment.spec import Environments


@dataclass(frozen=True)
class ArchivesState:
    """unpacked: environment to the SHA-256s of the archives of its whole trees, at the prefix and beside it.

    parcels: places that hold an archive. node: what it offers to run them. stale_keys: names of one-time keys whose transfer is over.
    sources: environment to the identity of its source on the shared storage, as the head sees it.
    noted: names of the declared archives that the head noted there as used. unused: those that it noted earlier
    and that nothing came to lately, with their bytes.
    """

    unpacked: Mapping[str, frozenset[str]]
    parcels: frozenset[str]
    node: Offer
    stale_keys: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)
    noted: frozenset[str] = frozenset()
    unused: Mapping[str, int] = field(default_factory=dict)


def probe(target: Target[Environments]) -> str:
    """What the node offers, then ``source NAME IDENTITY``, ``stamp NAME JSON``, ``parcel PATH``, ``noted NAME``,
    ``unused NAME BYTES`` and ``key NAME``; ``end`` is the last."""
    parts, parcels = [], []
    for one in target.spec.each():
        if target.is_head:
            parts.append(taking.probe(target.cluster, one))
        archive = archive_of(target.cluster, one)
        if archive:
            parcels.append(parcel_of(target.cluster, one, archive))
        prefix = quote(one.prefix)
        parts.append(
            f"for t in {prefix} {prefix}.lockstep-old {prefix}.lockstep-new-*; do\n"
            f'  if [ -f "$t/{STAMP}" ]; then IFS= read -r l <"$t/{STAMP}"\n'
            f"    printf 'stamp %s %s\\n' {one.name} \"$l\"; fi\ndone\n"
        )
    keys = f"{relay.stale(target.node.ssh.user, taker(target)).strip()} | sed 's/^/key /'\n"
    notes = depot.probe(target.cluster, parcels) if target.is_head else ""
    return "".join(
        [PROBE, *parts, parcel.probe(parcels, target.cluster), notes, keys, "echo end\n"]
    )


def taker(target: Target[Environments]) -> str:
    """From where the node's one-time keys are used: a peer's address."""
    return next(iter(target.others), target.node).address


@whole
def parse(text: str) -> ArchivesState:
    """The state that ``probe`` printed."""
    unpacked: dict[str, set[str]] = {}
    parcels: set[str] = set()
    keys: set[str] = set()
    sources: dict[str, str] = {}
    noted: set[str] = set()
    unused: dict[str, int] = {}
    node, rest = offer(text)
    for line in rest.split("\n"):
        word, _, value = line.partition(" ")
        if word == "parcel":
            parcels.add(value)
        elif word == "stamp":
            name, _, stamp = value.partition(" ")
            unpacked.setdefault(name, set()).add(str(stamp_values(stamp).get("archive", "")))
        elif word == "source":
            name, identity = value.split(" ")
            sources[name] = identity
        elif word == "noted":
            noted.add(value)
        elif word == "unused":
            name, size = value.split(" ")
            unused[name] = int(size)
        elif word == "key" and value.startswith(relay.MARK):
            keys.add(value)
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    whole_trees = {name: frozenset(found) for name, found in unpacked.items()}
    return ArchivesState(
        whole_trees, frozenset(parcels), node, frozenset(keys), sources, frozenset(noted), unused
    )
