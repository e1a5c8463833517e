"""What a node has of each directory that is kept the same: what it gives, what lies in place, what is wrong there."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, cast, get_args

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.packages.managers import Manager
from roles.storage.spec import StorageSpec
from roles.sync.declared import Entry, entries
from roles.sync.scripts import COMPARE, DAMAGED, LIST, MANIFEST, REFUSE, SOURCE

Place = Literal["absent", "empty", "foreign", "ours"]
SECONDS = 120
"""Every file's size and time is looked at."""


@dataclass(frozen=True)
class Given:
    """A directory that others get.

    listing: its digest; empty where refused, in words, or absent. earlier: the digest of what was last
    read there; empty where nothing was. lost: how many files of that are there no more.
    """

    listing: str = ""
    refused: str = ""
    earlier: str = ""
    lost: int = 0


@dataclass(frozen=True)
class Seen:
    """One directory on a node.

    given: what it gives, where the content comes from this node. read: the digest of the listing that was
    last read there. place: what lies in its place. listing, manifest: digests of what was brought there.
    wrong, strays: some of the paths that are not as they were brought, and that others put there; how many.
    """

    place: Place
    given: Given | None = None
    read: str = ""
    listing: str = ""
    manifest: str = ""
    wrong: tuple[str, ...] = ()
    wrongs: int = 0
    stray: tuple[str, ...] = ()
    strays: int = 0


@dataclass(frozen=True)
class SyncState:
    """rsync: whether the node has it. seen: by the key of the entry."""

    manager: Manager
    rsync: bool
    seen: Mapping[str, Seen] = field(default_factory=dict)


GIVEN = rf"""
{LIST}{REFUSE}
# given DIRECTORY SOURCE: the digests of its listing and of the one in SOURCE, and how many files it lost since
# then; or why it cannot be given.
given() {{
  if ! test -d "$1" || ! cd "$1" 2>/dev/null; then echo absent; return; fi
  list >"$listing"
  why=$(refused "$listing")
  if test -n "$why"; then printf 'refused %s\n' "$why"; return; fi
  earlier=-; lost=0
  if test -f "$2"; then
    earlier=$(listed "$2" | digest)
    lost=$(awk -F '\t' 'part == 1 {{ there[$4] = 1; next }} $2 != "d" && !($5 in there) {{ n++ }} END {{ print n + 0 }}' \
      part=1 "$listing" part=2 "$2")
  fi
  echo "listing $(digest <"$listing") $earlier $lost"
}}
"""

LOOK = rf"""
{GIVEN}{COMPARE}
listing=$(mktemp) || exit 1
trap 'rm -f "$listing"' EXIT
if command -v dpkg-query >/dev/null; then echo 'manager apt'; else echo 'manager rpm'; fi
if command -v rsync >/dev/null; then echo 'rsync yes'; else echo 'rsync no'; fi
# look KEY PLACE NOTES GIVEN
look() {{
  if test -f "$3/{MANIFEST}"; then at=ours
  elif ! test -e "$2" && ! test -L "$2"; then at=absent
  elif test -d "$2" && test -z "$(ls -A "$2")"; then at=empty
  else at=foreign; fi
  echo "entry $1 $at"
  if test -n "$4"; then
    printf 'given %s\n' "$(given "$4" "$3/{SOURCE}")"
    if test -f "$3/{SOURCE}"; then echo "read $(listed "$3/{SOURCE}" | digest) $(digest <"$3/{SOURCE}")"; fi
    if test "$4" = "$2"; then return; fi
  fi
  if test $at != ours; then return; fi
  echo "brought $(listed "$3/{MANIFEST}" | digest) $(digest <"$3/{MANIFEST}")"
  bad=$3/{DAMAGED}; test -f "$bad" || bad=/dev/null
  if test -d "$2"; then (cd "$2" && list); fi | compare "$3/{MANIFEST}" "$bad"
}}
"""


def probe(target: Target[StorageSpec]) -> str:
    """Lines ``word value``: ``directories NUMBER`` is the first, ``entry KEY PLACE`` begins each directory, ``end`` is the last."""
    calls = []
    for each in entries(target.cluster):
        given = each.origin.path if each.origin.node == target.node.name else ""
        words = (each.key, each.place, each.notes, given)
        calls.append(f"look {' '.join(map(quote, words))}\n")
    look = f"{LOOK}{''.join(calls)}" if calls else ""
    return f"echo directories {len(calls)}\n{look}echo end\n"


@whole
def parse(text: str) -> SyncState:
    """The state that ``probe`` printed."""
    if text == "directories 0":
        return SyncState("apt", True)
    single: dict[str, str] = {}
    seen: dict[str, Seen] = {}
    compared: set[str] = set()
    key = ""
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word in ("directories", "manager", "rsync") and not key:
            single[word] = value
            continue
        if word == "entry":
            key, _, place = value.partition(" ")
            if key in seen or place not in get_args(Place):
                raise Unreadable(f"unexpected line {line!r}")
            seen[key] = Seen(cast(Place, place))
            continue
        if key not in seen:
            raise Unreadable(f"unexpected line {line!r}")
        one = seen[key]
        match word:
            case "given":
                seen[key] = replace(one, given=given(value))
            case "read" | "brought":
                listing, manifest = value.split(" ")
                if word == "read":
                    seen[key] = replace(one, read=listing, manifest=one.manifest or manifest)
                else:
                    seen[key] = replace(one, listing=listing, manifest=manifest)
            case "wrong":
                seen[key] = replace(one, wrong=(*one.wrong, value))
            case "stray":
                seen[key] = replace(one, stray=(*one.stray, value))
            case "wrongs":
                seen[key] = replace(one, wrongs=int(value))
            case "strays":
                seen[key] = replace(one, strays=int(value))
                compared.add(key)
            case _:
                raise Unreadable(f"unexpected line {line!r}")
    if lacking := [name for name, one in seen.items() if one.listing and name not in compared]:
        raise Unreadable(f"{lacking[0]} was not compared")
    if int(single["directories"]) != len(seen):
        raise Unreadable(f"it shows {len(seen)} of {single['directories']} directories")
    if single["manager"] not in ("apt", "rpm") or single["rsync"] not in ("yes", "no"):
        raise Unreadable("a package manager or rsync is not told")
    return SyncState(cast(Manager, single["manager"]), single["rsync"] == "yes", seen)


def given(text: str) -> Given:
    """What ``given`` printed."""
    word, _, value = text.partition(" ")
    if word == "absent" and not value:
        return Given()
    if word == "refused" and value:
        return Given(refused=value)
    words = value.split(" ")
    if word == "listing" and [len(each) for each in words[:2]] in ([64, 64], [64, 1]):
        listing, earlier, lost = words
        return Given(listing, earlier="" if earlier == "-" else earlier, lost=int(lost))
    raise Unreadable(f"unexpected words {text!r}")


@cache
def given_here(directory: str, source: Path) -> Given:
    """What a directory of the control machine gives; read once a run, so that all nodes are asked for the same.

    source: the manifest that was made of it last.
    """
    script = f"listing=$(mktemp) || exit 1\ntrap 'rm -f \"$listing\"' EXIT\n{GIVEN}given {quote(directory)} {quote(str(source))}"
    with (
        TemporaryFile("w+", errors="replace") as said,
        TemporaryFile("w+", errors="replace") as why,
    ):
        # Files, no pipes: nobody waits for a process that hangs in a file system and cannot be ended.
        look = subprocess.Popen(
            ["sh", "-c", script], stdout=said, stderr=why, start_new_session=True
        )
        try:
            look.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(look.pid, signal.SIGKILL)
            return Given(
                refused=f"it was not looked at within {SECONDS} seconds: is it on a server that is gone?"
            )
        (why if look.returncode else said).seek(0)
        return Given(refused=why.read().strip()) if look.returncode else given(said.read().strip())


def given_by(
    target: Target[StorageSpec], entry: Entry, seen: Seen, peers: Mapping[str, SyncState]
) -> Given | None:
    """What the directory's origin gives now; None where that node cannot be read."""
    node = entry.origin.node
    if node is None:
        return given_here(entry.origin.path, entry.here(target.cluster) / SOURCE)
    if node == target.node.name:
        return seen.given
    state = peers.get(node)
    return state.seen[entry.key].given if state is not None and entry.key in state.seen else None
