"""What a node holds of the declared environments, seen without starting Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from inventory.cluster import Cluster
from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment import launchers, parcel, sources
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.fit import PROBE, Offer, offer
from roles.environment.parcel import Parcel
from roles.environment.pinned import incomplete
from roles.environment.prove import PROOF, STAMP
from roles.environment.spec import Declared, Environments
from roles.storage.spec import depot

Tree = Literal["absent", "directory", "file"]


@dataclass(frozen=True)
class Command:
    """A file in bin. start: its first two lines if it is a script, else empty."""

    start: str
    executable: bool


@dataclass(frozen=True)
class Seen:
    """One environment on one node.

    tree: what lies at the prefix. stamp, proof: text of the stamps in it, or empty.
    interpreter: size and time of bin/python, empty where it cannot run; home: the node's interpreter
    that a venv borrows, as the real path, empty where it is missing.
    distributions: names of the metadata folders. site: site-packages, empty where there is none.
    commands: the declared ones that lie in bin. links: command that a login shall find to ok, absent,
    foreign, or where ours leads instead.
    fresh: trees beside the prefix that a broken-off change left, with their stamps (empty: half).
    kept: text of the stamp of the earlier tree that is kept beside it (empty: none in it); None without one.
    incomplete: what replaces some of the archive's distributions is still to be installed.
    """

    tree: Tree = "absent"
    stamp: str = ""
    proof: str = ""
    interpreter: str = ""
    home: str = ""
    site: str = ""
    distributions: frozenset[str] = frozenset()
    commands: Mapping[str, Command] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    kept: str | None = None
    incomplete: bool = False

    @property
    def facts(self) -> Mapping[str, str]:
        """What the last proof noted."""
        found = stamp_values(self.proof).get("facts")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class EnvironmentState:
    """environments: by name. parcels: places that hold an archive. node: what it offers to run them."""

    environments: Mapping[str, Seen]
    parcels: frozenset[str]
    node: Offer


def stamp_values(text: str) -> dict[str, Any]:
    """A stamp's values; empty for anything that is no stamp."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def archive_of(cluster: Cluster, one: Declared) -> Archive | None:
    """What the declared archive holds, or None when it cannot be used (a finding says why)."""
    try:
        return sources.described(cluster, one)
    except ArchiveProblem:
        return None


def parcel_of(cluster: Cluster, one: Declared, archive: Archive) -> Parcel:
    """The archive on its way to the nodes."""
    source = sources.archive_of(cluster, one)
    way = one.spec.distribute or ("shared" if depot(cluster) else "nodes")
    return Parcel(source, archive.sha256, f"archives/{archive.file_name}", way == "nodes")


STAMPS = f"""
for f in {STAMP} {PROOF}; do
  if [ -f "$P/$f" ]; then IFS= read -r l <"$P/$f"; printf '%s %s\\n' "$f" "$l"; fi
done
"""

DISTRIBUTIONS = """
for s in "$P"/lib/python3*/site-packages; do
  if [ -d "$s" ] && ! [ -L "${s%/site-packages}" ]; then
    printf 'site %s\\n' "$s"
    for d in "$s"/*.dist-info "$s"/*.egg-info; do
      if [ -e "$d" ]; then printf 'd %s\\n' "${d##*/}"; fi
    done
  fi
done
"""
"""Prints the site-packages at $P, and the metadata folders of its distributions."""


def probe(target: Target[Environments]) -> str:
    """What the node offers, then lines ``word value``; ``environment NAME`` begins each environment, ``end`` is the last."""
    parts = []
    parcels = []
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        if archive:
            parcels.append(parcel_of(target.cluster, one, archive))
        parts.append(_probe_one(one, archive))
    return "".join([PROBE, *parts, parcel.probe(parcels, target.cluster), "echo end\n"])


def _probe_one(one: Declared, archive: Archive | None) -> str:
    home = quote(archive.home) if archive and archive.home else ""
    borrowed = (
        f"if [ -x {home} ]; then h=$(readlink -f {home}) || exit 1; printf 'home %s\\n' \"$h\"; fi\n"
        if home
        else ""
    )
    condition = incomplete(one, archive)
    unfinished = f"if {condition}; then echo incomplete; fi\n" if condition else ""
    commands = " ".join(map(quote, [*one.spec.commands, *one.optional]))
    return (
        f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {quote(one.name)}\n"
        'if [ -d "$P" ]; then echo "tree directory"\n'
        'elif [ -e "$P" ] || [ -L "$P" ]; then echo "tree file"; fi\n'
        f"{STAMPS}{DISTRIBUTIONS}{borrowed}{unfinished}"
        'if [ -x "$P/bin/python" ]; then stat -L -c "interpreter %s %Y" "$P/bin/python" || exit 1; fi\n'
        f"for c in {commands}; do f=$P/bin/$c\n"
        '  if [ -f "$f" ]; then\n'
        '    x=no; [ -x "$f" ] && x=yes; a=; b=\n'
        '    { IFS= read -r a; IFS= read -r b; } <"$f"\n'
        '    case $a in "#!"*) ;; *) a=; b=;; esac\n'
        "    case $b in \"'''exec'\"*) ;; *) b=;; esac\n"
        '    printf \'command %s %s %s\\t%s\\n\' "$c" $x "$a" "$b"\n'
        "  fi\ndone\n"
        f"{launchers.look(one)}"
        'for n in "$P".lockstep-new-*; do\n'
        '  if [ -d "$n" ]; then l=\n'
        f'    if [ -f "$n/{STAMP}" ]; then IFS= read -r l <"$n/{STAMP}"; fi\n'
        '    printf \'fresh %s\\t%s\\n\' "${n#"$P"}" "$l"\n'
        "  fi\ndone\n"
        'if [ -d "$P.lockstep-old" ]; then l=\n'
        f'  if [ -f "$P.lockstep-old/{STAMP}" ]; then IFS= read -r l <"$P.lockstep-old/{STAMP}"; fi\n'
        "  printf 'kept %s\\n' \"$l\"\nfi\n"
    )


@whole
def parse(text: str) -> EnvironmentState:
    """The state that ``probe`` printed."""
    environments: dict[str, dict[str, Any]] = {}
    parcels: set[str] = set()
    now: dict[str, Any] = {}
    node, rest = offer(text)
    for line in rest.split("\n"):
        word, _, value = line.partition(" ")
        if word == "environment":
            now = {"distributions": set(), "commands": {}, "links": {}, "fresh": {}}
            environments[value] = now
        elif word == "parcel":
            parcels.add(value)
        elif line:
            if not environments:
                raise Unreadable(f"unexpected line {line!r}")
            _note(now, word, value)
    return EnvironmentState(
        {
            name: Seen(**{**values, "distributions": frozenset(values["distributions"])})
            for name, values in environments.items()
        },
        frozenset(parcels),
        node,
    )


def _note(now: dict[str, Any], word: str, value: str) -> None:
    if word in ("tree", "interpreter", "home", "site", "kept"):
        now[word] = value
    elif word == STAMP:
        now["stamp"] = value
    elif word == PROOF:
        now["proof"] = value
    elif word == "incomplete":
        now[word] = True
    elif word == "d":
        now["distributions"].add(value)
    elif word == "command":
        name, executable, start = value.split(" ", 2)
        now["commands"][name] = Command(start.replace("\t", "\n").rstrip("\n"), executable == "yes")
    elif word == "link":
        name, _, leads = value.partition(" ")
        now["links"][name] = leads
    elif word == "fresh":
        name, _, stamp = value.partition("\t")
        now["fresh"][name] = stamp
    else:
        raise Unreadable(f"unexpected line {word!r}")
