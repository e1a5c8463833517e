"""What lies under the shared path on a node: which mount, how full, and whose marks are seen there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from roles.core.fstab import POINT
from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.packages.managers import Manager
from roles.storage import shutdown
from roles.storage.mount import OWN, wanted
from roles.storage.spec import StorageSpec, storage_path

TOKEN_FILE = "/var/lib/lockstep/storage-token"
"""A node's own token, on its own disk; its twin lies on the shared storage under the node's name."""


def token_file(target: Target[StorageSpec]) -> str:
    """Where the node has its token; of storage that is its own, and of a place beside it, one for each path."""
    spec = target.spec
    if spec.kind != "local" and spec.path == storage_path(target.cluster):
        return TOKEN_FILE
    return TOKEN_FILE + spec.path.replace("%", "%25").replace("-", "%2D").replace("/", "-")


TOKEN = re.compile(r"[0-9a-f]{16,64}")

TOUCH_SECONDS = 8
"""How long a look waits for a path that may be a mount of a server that is gone."""

Access = Literal["yes", "absent", "stale", "silent", "failed"]


@dataclass(frozen=True)
class Mount:
    """The mount that holds the path. options: those of the mount and of the file system."""

    point: str
    kind: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """A line of /etc/fstab, its words as they are, parted by one space."""

    source: str
    point: str
    kind: str
    text: str


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
    """access: "absent" when the directory is not there, "stale" when its file handle is dead, "silent"
    when it gave no answer in time, "failed" for another error, which failure tells.

    client: what mounts NFS is installed.
    fstab: lines for the path, and Lockstep's own for other paths. live: what is mounted exactly at the
    path, the latest last; the point of systemd's automount is among it, with the kind autofs.
    real: the path without symbolic links.
    exported: this node's NFS server gives the directory to others. writable: root may write there.
    free, inodes: what is left, in MiB and in number; inodes is None where there is no limit.
    same: the path is the directory of this node that is to be bound there; None where none is.
    entry: one name in the directory; "" where it is empty, or where nothing is to be mounted.
    shutdown: digest of what lets a shutdown go on without the server; "" where none is. ready: it is
    enabled and waits for the next shutdown.
    open: Lockstep's directories there that group or others may write.
    mark: only looked for on storage that is shared.
    token: this node's own, from its own disk. tokens: node name to the tokens of this cluster seen on the storage.
    known: the own one is there, under whatever name of the cluster it was written.
    """

    access: Access
    failure: str = ""
    manager: Manager = "apt"
    client: bool = False
    fstab: tuple[Line, ...] = ()
    live: tuple[Mount, ...] = ()
    real: str = ""
    mount: Mount | None = None
    exported: bool = False
    writable: bool = False
    free: int = 0
    inodes: int | None = None
    same: bool | None = None
    entry: str = ""
    shutdown: str = ""
    ready: bool = False
    mark: Mark | None = None
    open: tuple[str, ...] = ()
    token: str | None = None
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    known: bool = False


# Directories are listed, not files opened: listing a directory makes an NFS client ask its server
# again, so that what another node wrote a moment ago is seen. The token is part of the file's name.
_TOUCH = r"""
space=
if ! cd "$path" 2>/dev/null || ! space=$(stat -f -c 'space %S %a %c %d' . 2>&1); then
  said=${space:-$(ls -d "$path/." 2>&1)} && test -z "$space" && { echo "cannot enter $path" >&2; exit 1; }
  case $said in
    *'No such file'*|*'Not a directory'*) echo 'access absent' ;;
    *'tale file handle'*) echo 'access stale' ;;
    *) echo "access failed ${said##*: }" ;;
  esac
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
echo "$space"
if test -n "$bound"; then if test . -ef "$bound"; then echo 'same yes'; else echo 'same no'; fi; fi
if test -n "$mounted"; then ls -A | { if read -r name; then echo "entry $name"; fi; }; fi
set -- .[l]ockstep .lockstep/[n]odes .lockstep/nodes/* ".lockstep/nodes/$cluster"/*
if test -d .lockstep; then
  id=
  if test -z "$alone" && test -e .lockstep/id; then read -r id <.lockstep/id || test -n "$id" || :; fi
  for word in "$@"; do case $word in */nodes/*/*.*) echo "seen ${word##*/}" ;; esac; done
  if test -n "$token"; then
    for word in .lockstep/nodes/*/*."$token"; do if test -e "$word"; then echo 'known yes'; break; fi; done
  fi
  set -- .lockstep
  for word in .lockstep/nodes ".lockstep/nodes/$cluster"; do if test -d "$word"; then set -- "$@" "$word"; fi; done
  stat -c 'mode %a %n' -- "$@" || exit 1
  if test -n "$id"; then stat -c "mark $id %i %Z" .lockstep/id || exit 1; fi
else set --; fi
writable=yes
if test -d runs; then set -- "$@" runs; fi
for word in . "$@"; do test -w "$word" || writable=no; done
echo "writable $writable"
"""
"""What touches the path, and so may wait for a server that is gone; a kill ends also that."""

# The kernel's table is read last: touching the path may have mounted it.
SCRIPT = rf"""
LC_ALL=C; export LC_ALL path cluster bound mounted alone token
token=
if test -e "$own"; then read -r token <"$own" || test -n "$token" || :; fi
echo "token $token"
if command -v dpkg-query >/dev/null; then echo 'manager apt'; else echo 'manager rpm'; fi
if test -x /sbin/mount.nfs; then echo 'client yes'; else echo 'client no'; fi
seen=$(timeout -s KILL {TOUCH_SECONDS} sh -s <<'TOUCH'
{_TOUCH.strip()}
TOUCH
)
code=$?
case $code in
  0) printf '%s\n' "$seen" ;;
  124|137) echo 'access silent' ;;
  *) exit $code ;;
esac
test -r "$fstab" || fstab=/dev/null
awk '{POINT.strip()}
FILENAME == "/proc/self/mountinfo" {{
  if ($5 != ENVIRON["path"]) next
  for (i = 7; i <= NF && $i != "-"; i++);
  print "live " $5 " " $(i + 1) " " $(i + 2) " " $(i + 3); next
}}
$1 ~ /^#/ || NF < 4 {{ next }}
{{ at = point($2) }}
at == ENVIRON["path"] || index("," $4 ",", ",{OWN},") {{ print "fstab " $1 " " at " " $3 " " $4 " " $5 + 0 " " $6 + 0 }}
' "$fstab" /proc/self/mountinfo || exit 1
{shutdown.SHOW.strip()}
echo end
"""


def probe(target: Target[StorageSpec]) -> str:
    """Two awks and two or three stats; enters the path, so that an automount happens, in bounded time."""
    mount = wanted(target)
    bound = mount.source if mount and mount.kind == "none" else ""
    alone = "yes" if target.spec.kind == "local" else ""
    return (
        f"alone={alone} path={quote(target.spec.path)} own={quote(token_file(target))} cluster={quote(target.cluster.name)}\n"
        f"fstab=/etc/fstab bound={quote(bound)} mounted={'yes' if mount else ''}"
        f"{SCRIPT}"
    )


_SINGLE = {
    *("token", "manager", "client", "access", "real", "mount", "exported", "writable", "space"),
    *("same", "entry", "mark", "shutdown", "known"),
}


@whole
def parse(text: str) -> StorageState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    opened: list[str] = []
    tokens: dict[str, list[str]] = {}
    fstab: list[Line] = []
    live: list[Mount] = []
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
        elif kind == "fstab":
            source, point, of, _, _, _ = rest.split(" ")
            fstab.append(Line(source, point, of, rest))
        elif kind == "live":
            live.append(_mount(rest))
        elif kind in _SINGLE:
            single[kind] = rest
        else:
            raise Unreadable(f"{line[:60]!r} is not understood")
    access, _, failure = single["access"].partition(" ")
    if access not in ("yes", "absent", "stale", "silent", "failed"):
        raise Unreadable(f"an access cannot be {access!r}")
    if single["manager"] not in ("apt", "rpm") or single["client"] not in ("yes", "no"):
        raise Unreadable("a package manager or a client is not told")
    digest, _, ready = single.get("shutdown", "").partition(" ")
    if "shutdown" in single and ready not in ("yes", "no"):
        raise Unreadable("a unit is neither ready nor not")
    known = StorageState(
        access=cast(Access, access),
        failure=failure,
        manager=cast(Manager, single["manager"]),
        client=single["client"] == "yes",
        fstab=tuple(fstab),
        live=tuple(live),
        shutdown=digest,
        ready=ready == "yes",
        token=single["token"] if TOKEN.fullmatch(single["token"]) else None,
    )
    if access != "yes":
        return known
    size, blocks, inodes_all, inodes = (int(word) for word in single["space"].split())
    return replace(
        known,
        real=single["real"],
        mount=_mount(single["mount"]),
        exported=single["exported"] == "yes",
        writable=single["writable"] == "yes",
        free=size * blocks // 2**20,
        inodes=inodes if inodes_all else None,
        same=single["same"] == "yes" if "same" in single else None,
        entry=single.get("entry", ""),
        mark=Mark(*single["mark"].split()) if "mark" in single else None,
        open=tuple(opened),
        tokens={node: tuple(seen) for node, seen in tokens.items()},
        known="known" in single,
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
