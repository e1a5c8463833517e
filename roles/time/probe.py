"""Whether a node runs chrony with the declared configuration, whom it follows, and how far off it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from roles.core.role import Target, Unreadable, whole
from roles.packages.managers import Manager
from roles.time.spec import TimeSpec

CHRONY_UNITS = ("chrony.service", "chronyd.service")

OTHER_UNITS = (
    "systemd-timesyncd.service",
    "ntp.service",
    "ntpd.service",
    "ntpsec.service",
    "openntpd.service",
    "ntpdate.service",
)
"""What else sets a clock; two of them fight over it. An ntpdate service sets it once, at boot."""

OTHER_PACKAGES = ("systemd-timesyncd", "ntp", "ntpsec", "openntpd")
"""Debian's packages that exclude chrony, by their own word (Conflicts: time-daemon)."""

OWN_CLOCK = "7F7F0101"
"""How chrony names its reference where the node's own clock is it."""

CAP_SYS_TIME = 25
"""The capability without which nothing on the node can set its clock."""


@dataclass(frozen=True)
class Unit:
    """A service as systemd knows it: LoadState, ActiveState and UnitFileState."""

    load: str
    active: str
    file: str


@dataclass(frozen=True)
class Tracking:
    """What chronyd says of itself.

    reference: address of the source that it follows, or its reference id where that is no address.
    heard: time of its last update, in seconds since 1970. offset: of the clock, in seconds.
    leap: ``Normal`` (or an announced leap second), or ``Not synchronised``.
    """

    reference: str
    heard: float
    offset: float
    leap: str

    @property
    def synchronised(self) -> bool:
        """Whether chronyd holds its time for right."""
        return self.leap != "Not synchronised"


@dataclass(frozen=True)
class TimeState:
    """now: the node's clock at the look, in seconds since 1970. bound: the declared most offset.

    installed: chronyd is there. may_set: processes of this node may set its clock; in many containers
    they may not. packages: installed packages that exclude chrony. units: service to its state, under
    its own name alone: ntpsec's also answers to ntp and ntpd.
    config: text of chrony's configuration. stale: it is younger than the chronyd that runs.
    tracking: None where no chronyd answers.
    """

    manager: Manager
    now: float
    bound: float
    installed: bool
    may_set: bool
    packages: tuple[str, ...]
    units: Mapping[str, Unit]
    config: str | None
    stale: bool
    tracking: Tracking | None

    @property
    def unit(self) -> str:
        """chrony's service; Debian's also answers to the other name."""
        return CHRONY_UNITS[0] if self.manager == "apt" else CHRONY_UNITS[1]

    @property
    def path(self) -> str:
        """chrony's configuration file."""
        return "/etc/chrony/chrony.conf" if self.manager == "apt" else "/etc/chrony.conf"


def probe(target: Target[TimeSpec]) -> str:
    """Lines of a key and a value, what systemd shows of the services, and the configuration last."""
    return f"""
PATH=$PATH:/usr/sbin:/sbin
say() {{ printf '%s\\t%s\\n' "$1" "$2"; }}
if command -v dpkg-query >/dev/null; then
  say manager apt; conf=/etc/chrony/chrony.conf
  for name in {" ".join(OTHER_PACKAGES)}; do
    if test -e "/var/lib/dpkg/info/$name.md5sums"; then say package "$name"; fi
  done
elif command -v rpm >/dev/null; then say manager rpm; conf=/etc/chrony.conf
else echo 'neither dpkg nor rpm is there' >&2; exit 3
fi
say now "$(date +%s)"
say bound {target.spec.max_offset}
while read -r key value rest; do case $key in CapBnd:) say capabilities "$value";; esac; done </proc/1/status
if test -x /usr/sbin/chronyd; then
  say installed yes
  if said=$(chronyc -n -c tracking 2>&1); then say tracking "$said"; fi
else say installed no
fi
for file in /run/chrony/chronyd.pid /run/chronyd.pid; do
  if test "$conf" -nt "$file" && test -e "$file"; then say stale yes; fi
done
systemctl show -p Id -p LoadState -p ActiveState -p UnitFileState {" ".join([*CHRONY_UNITS, *OTHER_UNITS])} || exit 3
if test -e "$conf"; then say config present; cat "$conf" || exit 3; else say config absent; fi
echo; echo end
""".strip()


@whole
def parse(text: str) -> TimeState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    packages: list[str] = []
    units: dict[str, Unit] = {}
    shown = 0
    block: dict[str, str] = {}
    config: list[str] | None = None
    lines = iter([*text.split("\n")])
    for line in lines:
        key, tab, value = line.partition("\t")
        if tab and key == "config":
            single[key] = value
            config = list(lines)
        elif tab and key == "package":
            packages.append(value)
        elif tab and key in _SINGLE:
            single[key] = value
        elif not tab and "=" in line:
            name, _, value = line.partition("=")
            if name in block:  # blocks are parted by an empty line; old versions also end without
                raise Unreadable(f"two {name} in one block")
            block[name] = value
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
        if block and (not line or config is not None):
            units[block["Id"]] = Unit(
                block["LoadState"], block["ActiveState"], block["UnitFileState"]
            )
            shown += 1
            block = {}
    manager = single["manager"]
    if manager not in ("apt", "rpm"):
        raise Unreadable(f"a package manager cannot be {manager!r}")
    if single["config"] not in ("present", "absent") or single["installed"] not in ("yes", "no"):
        raise Unreadable("an answer is neither yes nor no")
    # Counted, because a name may stand for another service: then this one is shown twice.
    if shown != len([*CHRONY_UNITS, *OTHER_UNITS]):
        raise Unreadable("a service is missing in the answer")
    return TimeState(
        manager=cast(Manager, manager),
        now=float(single["now"]),
        bound=float(single["bound"]),
        installed=single["installed"] == "yes",
        may_set=bool(int(single["capabilities"], 16) >> CAP_SYS_TIME & 1),
        packages=tuple(packages),
        units=units,
        config="\n".join(config or []) if single["config"] == "present" else None,
        stale="stale" in single,
        tracking=_tracking(single["tracking"]) if "tracking" in single else None,
    )


_SINGLE = {"manager", "now", "bound", "capabilities", "installed", "tracking", "stale"}


def _tracking(line: str) -> Tracking:
    """One line of ``chronyc -c tracking``: reference id, address, stratum, time of the last update,
    the clock's offset, eight more numbers, and the leap status."""
    fields = line.split(",")
    if len(fields) != 14 or fields[13] not in _LEAP:
        raise Unreadable(f"chronyc answered {line!r}")
    return Tracking(fields[1] or fields[0], float(fields[3]), float(fields[4]), fields[13])


_LEAP = ("Normal", "Insert second", "Delete second", "Not synchronised")
