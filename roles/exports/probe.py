"""What a node exports by NFS, in its files and in the running server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.exports.spec import DROP_IN, FILE, UNIT, serves
from roles.packages.managers import Manager
from roles.storage.probe import unescaped
from roles.storage.spec import StorageSpec, exported


@dataclass(frozen=True)
class ExportsState:
    """directory: the one to export is there. installed: the NFS server is.

    file, drop_in: text of Lockstep's own files; None where there is none.
    clients: client of the running server to its options, for that directory.
    elsewhere: files of exports, not Lockstep's, that name it.
    nested: (kind, point) of what is mounted below it and not exported itself; for NFS 3, not with nohide.
    active, enabled: of the service, as systemd says. threads: of the running server; 0 where none runs.
    """

    manager: Manager
    directory: bool = False
    installed: bool = False
    file: str | None = None
    drop_in: str | None = None
    clients: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    nested: tuple[tuple[str, str], ...] = ()
    active: str = ""
    enabled: str = ""
    threads: int = 0


SCRIPT = rf"""
PATH=$PATH:/usr/sbin:/sbin
text() {{ if test -e "$2"; then while IFS= read -r line || test -n "$line"; do echo "$1 $line"; done <"$2"; fi; }}
if command -v dpkg-query >/dev/null; then echo 'manager apt'; else echo 'manager rpm'; fi
text file "$file"
text drop-in "$drop"
if test -n "$directory"; then
  if test -d "$directory"; then echo 'directory yes'; else echo 'directory no'; fi
  if command -v exportfs >/dev/null && command -v rpc.nfsd >/dev/null; then echo 'installed yes'; else echo 'installed no'; fi
  systemctl show -p ActiveState -p UnitFileState {UNIT} || exit 3
  if test -r "$etab"; then
    while read -r point client; do
      if test "$point" = "$directory"; then echo "client $client"; fi
    done <"$etab"
  fi
  if test -r "$etab"; then set -- "$etab"; else set --; fi
  real=$(cd "$directory" 2>/dev/null && pwd -P) mounts=$mounts hides=$hides awk '
FILENAME != ENVIRON["mounts"] {{ if (ENVIRON["hides"] == "" || $0 ~ /[(,]nohide[,)]/) known[$1] = 1; next }}
index($5, ENVIRON["real"] "/") == 1 && ENVIRON["real"] != "" && !known[$5] {{
  for (i = 7; i <= NF && $i != "-"; i++);
  print "nested " $(i + 1) " " $5
}}' "$@" "$mounts" || exit 3
  for other in "$main" "${{file%/*}}"/*.exports; do
    if test "$other" = "$file" || ! test -r "$other"; then continue; fi
    while read -r point client || test -n "$point"; do
      case $point in "$directory"|"$directory/"|\""$directory"\") echo "elsewhere $other"; break ;; esac
    done <"$other"
  done
  threads=0
  if test -r "$nfsd"; then read -r threads <"$nfsd" || exit 3; fi
  echo "threads $threads"
fi
echo end
"""


def probe(target: Target[StorageSpec]) -> str:
    """On the server all of it; on another node what it may have kept of the time when it was the server."""
    directory = exported(target.spec) if serves(target) else ""
    hides = (
        "yes" if target.spec.version == "3" else ""
    )  # what is exported below, unless with nohide
    return (
        f"main=/etc/exports file={FILE} drop={DROP_IN} directory={quote(directory)} "
        f"etab=/var/lib/nfs/etab nfsd=/proc/fs/nfsd/threads mounts=/proc/self/mountinfo hides={hides}{SCRIPT}"
    )


@whole
def parse(text: str) -> ExportsState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    clients: dict[str, tuple[str, ...]] = {}
    elsewhere: list[str] = []
    nested: list[tuple[str, str]] = []
    for line in text.split("\n"):
        key, _, rest = line.partition(" ")
        name, equals, value = line.partition("=")
        if key in ("file", "drop-in"):
            texts.setdefault(key, []).append(rest)
        elif key == "client":
            client, bracket, options = rest.partition("(")
            if not bracket or not options.endswith(")"):
                raise Unreadable(f"{rest[:60]!r} is no client of an export")
            clients[client] = tuple(options[:-1].split(","))
        elif key == "nested":
            kind, _, point = rest.partition(" ")
            nested.append((kind, unescaped(point)))
        elif key == "elsewhere":
            elsewhere.append(rest)
        elif key in ("manager", "directory", "installed", "threads"):
            single[key] = rest
        elif equals and name in ("ActiveState", "UnitFileState"):
            single[name] = value
        else:
            raise Unreadable(f"{line[:60]!r} is not understood")
    if single["manager"] not in ("apt", "rpm"):
        raise Unreadable(f"a package manager cannot be {single['manager']!r}")
    both = ["\n".join([*texts[key], ""]) if key in texts else None for key in ("file", "drop-in")]
    known = ExportsState(cast(Manager, single["manager"]), file=both[0], drop_in=both[1])
    if len(single) == 1:
        return known
    if {single["directory"], single["installed"]} - {"yes", "no"}:
        raise Unreadable("an answer is neither yes nor no")
    return ExportsState(
        known.manager,
        directory=single["directory"] == "yes",
        installed=single["installed"] == "yes",
        file=known.file,
        drop_in=known.drop_in,
        clients=clients,
        elsewhere=tuple(elsewhere),
        nested=tuple(nested),
        active=single["ActiveState"],
        enabled=single["UnitFileState"],
        threads=int(single["threads"]),
    )
