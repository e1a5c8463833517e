"""What a node runs: its system and release, kernel, C library, systemd, and the tools that shell needs.

Written for a shell without any tool: what is missing must be named here, not fail here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from roles.core.role import Target, Unreadable, whole
from roles.system.oldest import TOOLS
from roles.system.spec import SystemSpec


@dataclass(frozen=True)
class SystemState:
    """id, release: of /etc/os-release; empty where it has none. machine: as ``uname -m`` names it.

    glibc, systemd, python, gcc: None where there is none, or none of that kind (musl).
    manager: apt or rpm; None where there is neither dpkg nor rpm. missing: tools that are not there.
    """

    id: str
    release: str
    kernel: str
    machine: str
    glibc: str | None = None
    systemd: int | None = None
    python: str | None = None
    gcc: str | None = None
    manager: str | None = None
    missing: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """Name and release in one, as ``debian 12``."""
        return f"{self.id or 'an unknown system'} {self.release}".rstrip()


def probe(target: Target[SystemSpec]) -> str:
    """Lines of a key, a tab and a value."""
    return f"""
PATH=$PATH:/usr/sbin:/sbin; LC_ALL=C; export LC_ALL
say() {{ printf '%s\\t%s\\n' "$@"; }}
ID= VERSION_ID=
if test -r /etc/os-release; then . /etc/os-release; fi
say id "$ID"; say release "$VERSION_ID"
read -r kernel </proc/sys/kernel/osrelease; say kernel "$kernel"
if ! read -r machine 2>/dev/null </proc/sys/kernel/arch; then machine=$(uname -m); fi
say machine "$machine"
if glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null); then say glibc "${{glibc#glibc }}"; fi
if test -d /run/systemd/system; then
  systemd=
  for f in /usr/lib/systemd/libsystemd-shared-*.so /lib/systemd/libsystemd-shared-*.so \\
    /usr/lib/*/systemd/libsystemd-shared-*.so; do
    if test -f "$f"; then systemd=${{f##*-shared-}}; break; fi
  done
  test -n "$systemd" || systemd=$(systemctl --version) || exit 3
  systemd=${{systemd#systemd }}; say systemd "${{systemd%%[!0-9]*}}"
fi
if test -x /usr/bin/python3; then version=$(/usr/bin/python3 -V 2>&1); say python "${{version#Python }}"; fi
if command -v gcc >/dev/null; then say gcc "$(gcc -dumpfullversion 2>/dev/null || gcc -dumpversion)"; fi
if command -v dpkg-query >/dev/null; then say manager apt
elif command -v rpm >/dev/null; then say manager rpm; fi
for t in {" ".join(TOOLS)}; do command -v $t >/dev/null || say missing $t; done
echo end
""".strip()


@whole
def parse(text: str) -> SystemState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    missing: list[str] = []
    for line in text.splitlines():
        key, tab, value = line.partition("\t")
        if not tab or "\t" in value or key in single or key not in {*_SINGLE, "missing"}:
            raise Unreadable(f"unexpected line {line!r}")
        if key == "missing":
            missing.append(value)
        else:
            single[key] = value
    for key in ("id", "release", "kernel", "machine"):
        if key not in single:
            raise Unreadable(f"no line tells the {key}")
    if not single["kernel"][:1].isdigit():
        raise Unreadable(f"a kernel cannot be {single['kernel']!r}")
    systemd = single.get("systemd")
    if systemd is not None and not systemd.isdecimal():
        raise Unreadable(f"a version of systemd cannot be {systemd!r}")
    return SystemState(
        id=single["id"],
        release=single["release"],
        kernel=single["kernel"],
        machine=single["machine"],
        glibc=single.get("glibc"),
        systemd=int(systemd) if systemd else None,
        python=single.get("python"),
        gcc=single.get("gcc"),
        manager=single.get("manager"),
        missing=tuple(missing),
    )


_SINGLE = {"id", "release", "kernel", "machine", "glibc", "systemd", "python", "gcc", "manager"}
