"""What lets a node shut down while the server of its storage is gone. Pure.

A hard mount waits for its server for ever, and so does each process that uses it. At shutdown systemd unmounts
it without waiting for those processes, takes it out of the tree as they use it, and then waits for each of them,
and once more for what they wrote: minutes, in which no force can be used any more. A unit that ends before the
mount comes first: it waits for the processes as long as the server gives any answer, and then lets go.
"""

from __future__ import annotations

import hashlib
import re

from roles.core.role import Target
from roles.core.steps import write_file
from roles.storage.mount import wanted
from roles.storage.spec import StorageSpec

NAME = "lockstep-storage-shutdown"
UNIT = f"{NAME}.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"
LINK = f"/etc/systemd/system/multi-user.target.wants/{UNIT}"
SCRIPT_FILE = f"/usr/local/sbin/{NAME}"
LEAST_SILENCE = 3
"""Seconds: a server that works answers within them also where it is busy."""

ERRORS = 3
"""So many errors, a second apart, may end a process by itself, before it is killed."""

USED_SECONDS = 240
"""So long what uses the mount may take to end; a job has 180 s for its checkpoint."""

MOUNTS = "/proc/self/mountinfo"
COUNTS = "/proc/self/mountstats"

SCRIPT = rf"""#!/bin/sh
# Lockstep: {UNIT} runs this at shutdown, with a mount point of NFS and seconds. While something uses the mount
# it is not unmounted. Once the server has answered nothing at all for so long, what waits for it gets an error,
# again and again, until the mount is gone; what still uses it then is killed.
point=$1 silence=$2
PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
export PATH LC_ALL point

mounted() {{
    awk '$5 == ENVIRON["point"] {{ for (i = 7; $i != "-"; i++); kind = $(i + 1) }}
        END {{ exit kind !~ /^nfs/ }}' {MOUNTS}
}}
answers() {{  # how many there were, of whatever was asked
    awk '$1 == "device" {{ here = $5 == ENVIRON["point"] }}
        here && $1 == "xprt:" {{ sum += $2 == "udp" ? $6 : $9 }} END {{ print sum + 0 }}' {COUNTS}
}}
users() {{
    find /proc/[0-9]*/cwd /proc/[0-9]*/fd -maxdepth 1 \( -lname "$point" -o -lname "$point/*" \) 2>/dev/null |
        cut -d / -f 3 | sort -u
}}

test "$(systemctl is-system-running)" = stopping || exit 0
while mounted; do
    before=$(answers)
    if timeout -s KILL "$silence" stat -f "$point" >/dev/null 2>&1 || test "$(answers)" != "$before"; then
        test -n "$(users)" || exit 0
        sleep 1
        continue
    fi
    echo "the server of $point gave no answer within $silence s: what waits for it is let go of, and not written"
    tries=0
    while mounted; do
        if test "$tries" -ge {ERRORS}; then
            for user in $(users); do test "$user" = 1 || kill -KILL "$user" 2>/dev/null; done
        fi
        lazily=; if test "$tries" -ge "$silence"; then lazily=-l; fi
        timeout -s KILL 2 umount -c -i -f $lazily "$point" >/dev/null 2>&1 || sleep 1
        tries=$((tries + 1))
    done
done
"""
"""``umount -f`` fails what is being asked of the server at that moment, and unmounts once nobody uses it."""


def silence(spec: StorageSpec) -> int:
    """So many seconds the server may be silent at shutdown: the rest of the timeout is for what comes then."""
    return max(LEAST_SILENCE, spec.timeout // 2)


def escaped(path: str) -> str:
    """The path as systemd names its units, see systemd-escape(1)."""
    inner = path.strip("/").replace("/", "\0")
    text = re.sub(r"[^A-Za-z0-9:_.\0]|^\.", lambda found: f"\\x{ord(found[0]):02x}", inner)
    return text.replace("\0", "-")


def unit(target: Target[StorageSpec]) -> str | None:
    """The unit's text for this node; None where nothing is mounted by NFS."""
    mount = wanted(target)
    if mount is None or mount.kind != "nfs":
        return None
    lines = [
        "[Unit]",
        f"Description=Lockstep lets go of {mount.point} where its server is gone",
        # At shutdown the order turns round; the automount would take what is in use out of the tree.
        f"After={escaped(mount.point)}.mount {escaped(mount.point)}.automount",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "ExecStart=/bin/true",
        f"ExecStop=/bin/sh {SCRIPT_FILE} {mount.point} {silence(target.spec)}",
        f"TimeoutStopSec={USED_SECONDS}",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def digest(text: str) -> str:
    """Of script and unit, as SHOW prints it."""
    return hashlib.sha256((SCRIPT + text).encode()).hexdigest()


SHOW = f"""
if test -e {SCRIPT_FILE} || test -e {UNIT_FILE}; then
  ready=no
  if test -h {LINK} && systemctl is-active -q {UNIT}; then ready=yes; fi
  digest=$(cat {SCRIPT_FILE} {UNIT_FILE} 2>/dev/null | sha256sum)
  echo "shutdown ${{digest%% *}} $ready"
fi
"""
"""Shell: ``shutdown DIGEST yes|no``, of the files and whether this shutdown and later ones run them; nothing
where none is."""


def put(text: str) -> str:
    """Shell that puts script and unit there for the next shutdown, and all later ones."""
    return (
        f"{write_file(SCRIPT_FILE, SCRIPT, mode='0755', backup=False)}\n"
        f"{write_file(UNIT_FILE, text, backup=False)}\n"
        f"systemctl daemon-reload\nsystemctl enable -q {UNIT}\nsystemctl start {UNIT}"
    )


def drop() -> str:
    """Shell that takes them away."""
    return (
        f"systemctl disable -q --now {UNIT} 2>/dev/null || :\n"
        f"rm -f {LINK} {UNIT_FILE} {SCRIPT_FILE}\nsystemctl daemon-reload"
    )
