"""What lies under the shared path on a node: which mount, how full, and whose marks are seen there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.storage.spec import StorageSpec

TOKEN_FILE = "/var/lib/lockstep/storage-token"
"""A node's own token, on its own disk; its twin lies on the shared storage under the node's name."""

TOKEN = re.compile(r"[0-9a-f]{16,64}")

Access = Literal["yes", "absent", "stale"]


@dataclass(frozen=True)
class Mount:
    """The mount that holds the path. options: those of the mount and of the file system."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Mark:
    """The file that names this storage. id: what the head wrote into it once.

    inode and changed (seconds) tell the file from a copy of it, which has other ones.
    """

    id: str
    inode: str
    changed: str


@dataclass(frozen=True)
class StorageState:
    """access: "absent" when the directory is not there, "stale" when its file handle is dead.

    real: the path without symbolic links.
    exported: this node's NFS server gives the directory to others. writable: root may write there.
    free, inodes: what is left, in MiB and in number; inodes is None where there is no limit.
    open: Lockstep's directories there that group or others may write.
    token: this node's own, from its own disk. tokens: node name to the tokens seen on the storage.
    """

    access: Access
    real: str = ""
    mount: Mount | None = None
    exported: bool = False
    writable: bool = False
    free: int = 0
    inodes: int | None = None
    mark: Mark | None = None
    open: tuple[str, ...] = ()
    token: str | None = None
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Directories are listed, not files opened: listing a directory makes an NFS client ask its server
# again, so that what another node wrote a moment ago is seen. The token is part of the file's name.
SCRIPT = r"""
LC_ALL=C; export LC_ALL
token=
if test -e "$own"; then read -r token <"$own" || test -n "$token" || :; fi
echo "token $token"
if ! cd "$path" 2>/dev/null; then
  said=$(ls -d "$path/." 2>&1) && { echo "cannot enter $path" >&2; exit 1; }
  case $said in
    *'No such file'*|*'Not a directory'*) echo 'access absent' ;;
    *'tale file handle'*) echo 'access stale' ;;
    *) echo "$said" >&2; exit 1 ;;
  esac
  echo end
  exit 0
fi
echo 'access yes'
here=$(pwd -P)
echo "real $here"
here=$here awk '
function plain(text) {
  gsub(/\\040/, " ", text); gsub(/\\011/, "\t", text); gsub(/\\012/, "\n", text); gsub(/\\134/, "\\", text)
  return text
}
BEGIN { here = ENVIRON["here"] "/" }
{
  point = plain($5); inside = point == "/" ? "/" : point "/"
  if (substr(here, 1, length(inside)) == inside && length(inside) >= best) { best = length(inside); line = $0 }
}
END {
  n = split(line, word, " "); for (i = 7; i <= n && word[i] != "-"; i++);
  print "mount " word[5] " " word[i + 1] " " word[i + 2] " " word[6] "," word[i + 3]
}' /proc/self/mountinfo || exit 1
exported=no
if test -r /var/lib/nfs/etab; then
  while read -r point word; do
    case $here/ in "$point"/*) exported=yes ;; esac
  done </var/lib/nfs/etab
fi
echo "exported $exported"
if test -w .; then echo 'writable yes'; else echo 'writable no'; fi
stat -f -c 'space %S %a %c %d' . || exit 1
set -- .[l]ockstep .lockstep/[n]odes .lockstep/nodes/* ".lockstep/nodes/$cluster"/*
if test -d .lockstep; then
  id=
  if test -e .lockstep/id; then read -r id <.lockstep/id || test -n "$id" || :; fi
  for word in "$@"; do case $word in */nodes/*/*.*) echo "seen ${word##*/}" ;; esac; done
  set -- .lockstep
  for word in .lockstep/nodes ".lockstep/nodes/$cluster"; do if test -d "$word"; then set -- "$@" "$word"; fi; done
  stat -c 'mode %a %n' -- "$@" || exit 1
  if test -n "$id"; then stat -c "mark $id %i %Z" .lockstep/id || exit 1; fi
fi
echo end
"""


def probe(target: Target[StorageSpec]) -> str:
    """One awk and two or three stats; enters the path first, so that an automount happens."""
    return (
        f"path={quote(target.spec.path)} own={quote(TOKEN_FILE)} cluster={quote(target.cluster.name)}"
        f"{SCRIPT}"
    )


@whole
def parse(text: str) -> StorageState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    opened: list[str] = []
    tokens: dict[str, list[str]] = {}
    for line in text.split("\n"):
        kind, _, rest = line.partition(" ")
        if kind == "seen":
            node, dot, token = rest.partition(".")
            if not dot:
                raise Unreadable(f"{rest!r} is no token")
            tokens.setdefault(node, []).append(token)
        elif kind == "mode":
            bits, path = rest.split(" ", 1)
            if int(bits, 8) & 0o022:
                opened.append(path)
        elif kind in ("token", "access", "real", "mount", "exported", "writable", "space", "mark"):
            single[kind] = rest
        else:
            raise Unreadable(f"{line[:60]!r} is not understood")
    own = single["token"] if TOKEN.fullmatch(single["token"]) else None
    if single["access"] in ("absent", "stale"):
        return StorageState("stale" if single["access"] == "stale" else "absent", token=own)
    size, blocks, inodes_all, inodes = (int(word) for word in single["space"].split())
    return StorageState(
        access="yes",
        real=single["real"],
        mount=_mount(single["mount"]),
        exported=single["exported"] == "yes",
        writable=single["writable"] == "yes",
        free=size * blocks // 2**20,
        inodes=inodes if inodes_all else None,
        mark=Mark(*single["mark"].split()) if "mark" in single else None,
        open=tuple(opened),
        token=own,
        tokens={node: tuple(seen) for node, seen in tokens.items()},
    )


def _mount(text: str) -> Mount:
    words = text.split(" ")
    if len(words) != 4 or not words[0].startswith("/"):
        raise Unreadable(f"{text[:60]!r} is no mount")
    point, kind, source, options = words
    return Mount(unescaped(point), kind, unescaped(source), tuple(options.split(",")))


def unescaped(text: str) -> str:
    r"""A path of /proc/self/mountinfo, where space, tab, line feed and backslash are octal (``\040``)."""
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\043", "#")):
        text = text.replace(code, letter)
    return text.replace("\\134", "\\")
