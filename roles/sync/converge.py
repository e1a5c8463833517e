"""Brings to each node what it lacks of the directories that are kept the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Mirror, Step, quote
from roles.packages.converge import installing
from roles.packages.spec import PackagesSpec
from roles.storage.spec import StorageSpec
from roles.sync.declared import Entry, entries
from roles.sync.drift import pairs, right
from roles.sync.probe import Seen, SyncState, given_by
from roles.sync.scripts import (
    DAMAGED,
    DOUBTED,
    LIST,
    MANIFEST,
    READ,
    SETTLE,
    SOURCE,
    SURVEY,
    WANTED,
)


def converge(
    target: Target[StorageSpec], state: SyncState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """rsync first, then one directory after the other."""
    if any(found.id == "sync-rsync" for found in findings):
        packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
        yield installing(packages, state.manager, ["rsync"])
    for entry, finding in list(pairs(target, state, peers)):
        if finding in findings and finding.repairable:
            yield mirror(target, entry, state, peers)


def mirror(target: Target[StorageSpec], entry: Entry, state: SyncState, peers: Peers) -> Mirror:
    """The step by which a node gets the directory; it is the same for all nodes."""
    here, landing = entry.here(target.cluster), entry.beside("arriving")
    arriving = {
        "name": entry.name,
        "notes": entry.notes,
        "place": entry.place,
        "landing": landing,
    }
    at = entry.notes if entry.origin.node else str(here)
    return Mirror(
        name=entry.name,
        giver=entry.origin.node,
        directory=entry.origin.path,
        place=entry.place,
        landing=landing,
        manifest=here / SOURCE,
        source=f"{entry.notes}/{SOURCE}",
        wanted=f"{entry.notes}/{WANTED}",
        paths=f"{entry.notes}/lacking0",
        read=with_variables(
            {"name": entry.name, "directory": entry.origin.path, "notes": at}, READ
        ),
        survey=with_variables({**arriving, "keep": str(target.spec.free << 20)}, SURVEY),
        settle=with_variables({**arriving, "strays": entry.beside("strays")}, SETTLE),
        doubt=with_variables({"notes": at}, DOUBTED),
        whole=partial(_whole, target, entry, state, peers),
    )


def _whole(
    target: Target[StorageSpec], entry: Entry, state: SyncState, peers: Peers
) -> Iterator[str]:
    """The other nodes that have it all already."""
    seen = state.seen.get(entry.key, Seen("absent"))
    given = given_by(target, entry, seen, peers)
    for node in target.others:
        other = peers.get(node.name)
        there = other.seen.get(entry.key) if other is not None else None
        if there is not None and right(entry, node.name, there, given):
            yield node.name


def with_variables(values: dict[str, str], script: str) -> str:
    """The script with these variables set."""
    return "".join(f"{name}={quote(value)}\n" for name, value in values.items()) + script


RIGHT_BACK = "copy the right file back from another node; where the new content is meant, touch the file and converge"

DEEP = rf"""
{LIST}
umask 022
# prove NAME NOTES MANIFEST PLACE ID FIX: hashes of all files; what is wrong is noted where the next run can mend it.
prove() {{
  test -f "$2/$3" && cd "$4" || return 0
  awk -F '\t' '$2 == "f" {{ print $1 "  ./" $5 }}' "$2/$3" | sha256sum -c 2>/dev/null | damaged >"$2/{DAMAGED}.new"
  if test -s "$2/{DAMAGED}.new"; then
    printf '%s\t%s at %s: %s of its files missing, cut or altered, the first is %s%s\n' "$5" "$1" "$4" \
      "$(wc -l <"$2/{DAMAGED}.new")" "$(head -n 1 "$2/{DAMAGED}.new")" "$6" | clean
    if test "$3" = {MANIFEST}; then mv -f "$2/{DAMAGED}.new" "$2/{DAMAGED}"; fi
  fi
  rm -f "$2/{DAMAGED}.new"
}}
"""


def deep(target: Target[StorageSpec]) -> str:
    """The hashes of all files; what one node gives from its place is told under an id of its own."""
    calls = []
    for entry in entries(target.cluster):
        given = entry.is_given_by(target.node.name)
        words = (
            entry.name,
            entry.notes,
            SOURCE if given else MANIFEST,
            entry.place,
            *(("sync-source-damaged", f"\t{RIGHT_BACK}") if given else ("sync-damaged", "")),
        )
        calls.append(f"prove {' '.join(map(quote, words))}\n")
    return f"{DEEP}{''.join(calls)}" if calls else "true"
