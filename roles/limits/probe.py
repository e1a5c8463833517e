"""What a fresh login gets, what it could be granted, and how large shared memory is.

The probe itself may run under sudo, whose own PAM session and whose own needs have already changed
its limits. So the login is judged by the sshd process that serves this look: it is the one on which
PAM set the limits, and every command of the login inherits them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from roles.core.fstab import POINT
from roles.core.role import Target, Unreadable, whole
from roles.limits.spec import LimitsSpec
from roles.limits.system import (
    SERVICES_FILE,
    SYSCTL_FILE,
    SYSCTLS,
    SystemState,
    parse_system,
    services_probe,
    sysctl_path,
)

OWN_FILE = "/etc/security/limits.d/90-lockstep.conf"

UNBOUNDED = 2**64 - 1
"""The kernel's "no limit"."""

CAP_SYS_RESOURCE = 24
"""The capability without which a process cannot raise a hard limit."""

_ITEMS = {"processes": "nproc", "open files": "nofile", "locked memory": "memlock"}


@dataclass(frozen=True)
class Limit:
    """Soft and hard value as the kernel counts them: files, processes, or bytes."""

    soft: int
    hard: int


@dataclass(frozen=True)
class Line:
    """A line of limits.conf or limits.d. path: its file. words: its four fields."""

    path: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"'{' '.join(self.words)}' in {self.path}"


@dataclass(frozen=True)
class Shm:
    """/dev/shm in bytes. mounted: it is a file system of its own. page: its block size."""

    size: int
    used: int
    page: int
    mounted: bool


@dataclass(frozen=True)
class LimitsState:
    """login: limits of this look's own login; None where it did not come through sshd.

    granted: what sshd itself has; without the right to raise (may_raise), no login gets more.
    init: what process 1 has, and so the most that sshd can have after a new start.
    nr_open: the kernel's most for open files. memory: the node's memory in bytes.
    lines: every line of limits.conf and limits.d. pam: service to whether pam_limits is in its
    session stack; a service that the node does not have is absent.
    use_pam: sshd's UsePAM; None where there is no configuration of sshd.
    fstab: the lines for /dev/shm. system: what belongs to the whole node.
    undoing: an interrupted run left a change that no login proved, and that undoes itself soon.
    """

    login: Mapping[str, Limit] | None
    granted: Mapping[str, Limit]
    may_raise: bool
    nr_open: int
    memory: int
    lines: tuple[Line, ...]
    pam: Mapping[str, bool]
    use_pam: bool | None
    shm: Shm
    fstab: tuple[str, ...]
    system: SystemState = field(default_factory=SystemState)
    undoing: bool = False
    init: Mapping[str, Limit] = field(default_factory=dict)


def probe(target: Target[LimitsSpec]) -> str:
    """Lines of its own, then the lines that matter of many files, each after its file's name.

    The walk upwards: the nearest sshd serves this login, the farthest is the one that listens. Where
    one process does both (a connection started by systemd), process 1 stands for the listener.
    """
    settings = " ".join(sysctl_path(name) for name in SYSCTLS)
    return (
        r"""
cd /
@services@
p=$$ login= listener=
while test "$p" -gt 0; do
  name= parent=0
  while read -r key value rest; do
    case $key in Name:) name=$value;; PPid:) parent=$value; break;; esac
  done <proc/$p/status || exit 3
  case $name in sshd|sshd-session) login=${login:-$p} listener=$p;; esac
  p=$parent
done
if test "$login" = "$listener"; then listener=1; fi
echo "login ${login:-none}"
echo "listener $listener"
for f in run/lockstep-limits.*/run; do if test -e "$f"; then echo undoing yes; break; fi; done
if test -d dev/shm; then stat -f -c 'shm %b %f %S' dev/shm || exit 3; else echo shm 0 0 4096; fi
for f in @settings@; do if test -e "$f" && ! test -w "$f"; then printf 'fixed\t%s\n' "$f"; fi; done
set -- proc/mounts proc/meminfo proc/sys/fs/nr_open proc/self/uid_map proc/$listener/status proc/$listener/limits
if test "$listener" != 1; then set -- "$@" proc/1/limits; fi
if test -n "$login"; then set -- "$@" "proc/$login/limits"; fi
for f in @settings@ @own@ etc/fstab etc/security/limits.conf etc/security/limits.d/*.conf \
  etc/pam.d/sshd etc/pam.d/sudo etc/pam.d/common-session etc/pam.d/common-session-noninteractive \
  etc/pam.d/system-auth etc/pam.d/password-auth etc/pam.d/postlogin \
  etc/ssh/sshd_config etc/ssh/sshd_config.d/*.conf
do if test -e "$f"; then set -- "$@" "$f"; echo "file $f"; fi; done
awk '@point@
function show() { print FILENAME "\t" $0 }
FILENAME ~ /limits$/ { if (/^Max (processes|open files|locked memory) /) show(); next }
FILENAME ~ /status$/ { if (/^CapEff:/) show(); next }
FILENAME ~ /meminfo$/ { if (/^MemTotal:/) show(); next }
FILENAME ~ /^proc\/(sys|self)/ { show(); next }
/^[ \t]*(#|$)/ { next }
FILENAME ~ /(mounts|fstab)$/ { if (point($2) == "/dev/shm") show(); next }
FILENAME ~ /pam\.d/ { if (/^[ \t]*(@include|-?session)[ \t]/) show(); next }
FILENAME ~ /sshd_config/ { if (tolower($1) ~ /^(usepam|include)/) show(); next }
{ show() }
' "$@" || exit 3
echo end
""".strip()
        .replace("@settings@", settings)
        .replace("@point@", POINT.strip())
        .replace("@own@", f"{SERVICES_FILE[1:]} {SYSCTL_FILE[1:]}")
        .replace("@services@", services_probe(target.spec))
    )


@whole
def parse(text: str) -> LimitsState:
    """The state that ``probe`` printed."""
    own: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    for line in text.split("\n"):
        name, tab, content = line.partition("\t")
        if tab:
            files.setdefault(name, []).append(content)
        else:
            key, _, rest = line.partition(" ")
            if key == "file":
                files.setdefault(rest, [])
            elif key in ("login", "listener", "shm", "undoing"):
                own[key] = rest
            else:
                raise Unreadable(f"{line[:60]!r} is not understood")
    login, listener = own["login"], own["listener"]
    blocks, free, page = (int(word) for word in own["shm"].split())
    capabilities = int(files[f"proc/{listener}/status"][0].split()[1], 16)
    first_map = [line.split() for line in files["proc/self/uid_map"]]
    return LimitsState(
        login=None if login == "none" else _limits(files[f"proc/{login}/limits"]),
        granted=_limits(files[f"proc/{listener}/limits"]),
        # In a user namespace the capability is there, but does not count for limits.
        may_raise=bool(capabilities >> CAP_SYS_RESOURCE & 1)
        and first_map == [["0", "0", "4294967295"]],
        nr_open=int(files["proc/sys/fs/nr_open"][0]),
        memory=int(files["proc/meminfo"][0].split()[1]) * 1024,
        lines=tuple(_limit_lines(files)),
        pam={
            service: _has_pam_limits(service, files, set())
            for service in ("sshd", "sudo")
            if f"etc/pam.d/{service}" in files
        },
        use_pam=_use_pam(files),
        shm=Shm(blocks * page, (blocks - free) * page, page, "proc/mounts" in files),
        fstab=tuple(files.get("etc/fstab", ())),
        system=parse_system(files),
        undoing="undoing" in own,
        init=_limits(files["proc/1/limits"]),
    )


def _limits(lines: Sequence[str]) -> dict[str, Limit]:
    found = {}
    for line in lines:
        match = re.match(r"Max (processes|open files|locked memory)\s+(\w+)\s+(\w+)\s", line)
        if not match:
            raise Unreadable(f"unexpected line {line!r}")
        found[_ITEMS[match[1]]] = Limit(_value(match[2]), _value(match[3]))
    if len(found) != len(_ITEMS):
        raise Unreadable("a limit is missing")
    return found


def _value(word: str) -> int:
    return UNBOUNDED if word == "unlimited" else int(word)


def _limit_lines(files: Mapping[str, Sequence[str]]) -> Iterable[Line]:
    for name, lines in files.items():
        if name.startswith("etc/security/"):
            for line in lines:
                words = tuple(line.partition("#")[0].split())
                if words:
                    yield Line(f"/{name}", words)


def _has_pam_limits(service: str, files: Mapping[str, Sequence[str]], seen: set[str]) -> bool:
    """Whether a session of the service runs pam_limits, included files followed."""
    if service in seen:
        return False
    seen.add(service)
    for line in files.get(f"etc/pam.d/{service}", ()):
        words = line.partition("#")[0].split()
        if words[0] == "@include":
            inner = words[1]
        elif words[1] in ("include", "substack"):
            inner = words[2]
        else:
            if any(re.search(r"(^|/)pam_limits(\.so)?$", word) for word in words[2:]):
                return True
            continue
        if _has_pam_limits(inner.rpartition("/")[2], files, seen):
            return True
    return False


def _use_pam(files: Mapping[str, Sequence[str]]) -> bool | None:
    """sshd takes the first value that it reads; a file's Include stands where it is written."""
    if "etc/ssh/sshd_config" not in files:
        return None
    included = [
        line
        for name, lines in files.items()
        if name.startswith("etc/ssh/sshd_config.d/")
        for line in lines
    ]
    for line in files["etc/ssh/sshd_config"]:
        for inner in included if _words(line)[0] == "include" else [line]:
            words = _words(inner)
            if words[0] == "usepam":
                return words[1] == "yes"
    return False


def _words(line: str) -> list[str]:
    return re.split(r"[\s=]+", line.strip().lower().replace('"', ""))
