"""The adapters of a node as sysfs shows them, and its subnet manager. No tool of InfiniBand is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.fabric.spec import FabricSpec
from roles.packages.managers import Manager as PackageManager

UNITS = ("opensm.service", "opensmd.service")
"""The distributions' name, and that of the vendor's packages."""


@dataclass(frozen=True)
class Port:
    """One port of an adapter. state, physical: as INIT and LinkUp. layer: InfiniBand or Ethernet.

    rate: as ``200 Gb/sec (4X HDR)``.
    """

    adapter: str
    number: int
    state: str
    physical: str
    layer: str
    rate: str

    @property
    def waits(self) -> bool:
        """The cable is right, and no subnet manager has configured the port."""
        return (
            self.layer == "InfiniBand"
            and self.state in ("INIT", "ARMED")
            and self.physical == "LinkUp"
        )

    @property
    def active(self) -> bool:
        """NCCL uses it."""
        return self.state == "ACTIVE"

    def __str__(self) -> str:
        return f"{self.adapter} port {self.number} {self.state} ({self.physical})"


@dataclass(frozen=True)
class Manager:
    """A unit of opensm that systemd knows."""

    unit: str
    active: bool
    enabled: bool


@dataclass(frozen=True)
class FabricState:
    """adapters: all, in order. ports: of all of them. managers: units of opensm.

    idle: InfiniBand cards on the PCI bus although no driver shows an adapter. verbs: libibverbs is there.
    packager: what installs packages here.
    """

    adapters: tuple[str, ...] = ()
    ports: tuple[Port, ...] = ()
    managers: tuple[Manager, ...] = ()
    idle: tuple[str, ...] = ()
    verbs: bool = True
    packager: PackageManager = "apt"

    @property
    def summary(self) -> str:
        """Number and rate of the ports in use, in words; or "none"."""
        rates = [f"{port.layer} {port.rate}" for port in self.ports if port.active]
        return ", ".join(f"{rates.count(rate)} x {rate}" for rate in sorted(set(rates))) or "none"


SCRIPT = r"""
export LC_ALL=C
cd "$sysfs" || exit 3
set --
found=
for each in class/infiniband/*/; do
  test -d "$each" || continue
  found=yes each=${each%/}
  echo "adapter ${each##*/}"
  for port in "$each"/ports/*/; do
    for file in state phys_state link_layer rate; do
      if test -e "$port$file"; then set -- "$@" "$port$file"; fi
    done
  done
done
test $# = 0 || awk '{ split(FILENAME, path, "/+"); print "port", path[3], path[5], path[6], $0 }' "$@" || exit 3
if test -z "$found" && test -d bus/pci/devices; then
  for each in bus/pci/devices/*/class; do if test -e "$each"; then set -- "$@" "$each"; fi; done
  test $# = 0 || awk '/^0x0207/ { split(FILENAME, path, "/"); print "idle", path[4] }' "$@" || exit 3
fi
verbs=no
for each in /lib/*/libibverbs.so.1 /usr/lib/*/libibverbs.so.1 /lib64/libibverbs.so.1 \
  /usr/lib64/libibverbs.so.1 /usr/lib/libibverbs.so.1 /usr/local/lib*/libibverbs.so.1; do
  if test -e "$each"; then verbs=yes; break; fi
done
echo "verbs $verbs"
if command -v dpkg-query >/dev/null; then echo packager apt; else echo packager rpm; fi
if test -n "$found$manages"; then
  for each in /etc/rc3.d/S*opensmd /etc/rc.d/rc3.d/S*opensmd; do
    if test -e "$each"; then echo starts; fi
  done
  found=$(systemctl show -p Id,LoadState,ActiveState,UnitFileState opensm.service opensmd.service) || exit 3
  printf '%s\n' "$found"
fi
echo end
"""


def probe(target: Target[FabricSpec]) -> str:
    """Lines ``WORD VALUE``, then units as systemd prints them; without an adapter no fork but one."""
    manages = "yes" if target.spec.subnet_manager == target.node.name else ""
    return f"sysfs={quote(target.spec.sysfs)} manages={manages}\n{SCRIPT.strip()}"


@whole
def parse(text: str) -> FabricState:
    """The state that ``probe`` printed."""
    words: dict[str, list[str]] = {}
    blocks: list[dict[str, str]] = [{}]
    for line in text.split("\n"):
        key, equals, value = line.partition("=")
        if equals and key in ("Id", "LoadState", "ActiveState", "UnitFileState"):
            blocks[-1][key] = value
        elif not line:
            blocks.append({})
        else:
            word, _, rest = line.partition(" ")
            if word not in ("adapter", "port", "idle", "verbs", "packager", "starts"):
                raise Unreadable(f"{line[:60]!r} is not understood")
            words.setdefault(word, []).append(rest)
    if words["verbs"] not in (["yes"], ["no"]):
        raise Unreadable("neither yes nor no")
    if words["packager"] not in (["apt"], ["rpm"]):
        raise Unreadable(f"packages cannot be installed by {words['packager']}")
    return FabricState(
        adapters=tuple(words.get("adapter", [])),
        ports=tuple(_ports(words.get("port", []))),
        managers=tuple(_managers(blocks, "starts" in words)),
        idle=tuple(words.get("idle", [])),
        verbs=words["verbs"] == ["yes"],
        packager=cast(PackageManager, words["packager"][0]),
    )


def _ports(lines: Sequence[str]) -> Iterator[Port]:
    found: dict[tuple[str, int], dict[str, str]] = {}
    for line in lines:
        adapter, number, file, value = line.split(" ", 3)
        found.setdefault((adapter, int(number)), {})[file] = value.strip()
    for (name, index), files in found.items():
        yield Port(
            name,
            index,
            _word(files["state"]),
            _word(files["phys_state"]),
            files.get("link_layer", "InfiniBand"),
            files.get("rate", "?"),
        )


def _word(value: str) -> str:
    match = re.fullmatch(r"\d+: ?(\S+(?: \S+)*)", value)  # as 5: LinkUp, or 7: Phy Test
    if match is None:
        raise Unreadable(f"{value!r} is no state of a port")
    return match[1]


def _managers(blocks: Sequence[Mapping[str, str]], starts: bool) -> Iterator[Manager]:
    for block in blocks:
        if block and (kind := _kind(block, starts)) is not None:
            yield Manager(block["Id"], block["ActiveState"] in ("active", "activating"), kind)


def _kind(block: Mapping[str, str], starts: bool) -> bool | None:
    """Whether the unit starts at boot; None where there is no such unit."""
    match block["LoadState"]:
        case "loaded":
            state = block.get("UnitFileState", "")
            # An old init script has a unit made for it, and links of its own that say when it starts.
            return starts if state in ("generated", "") else state in ("enabled", "enabled-runtime")
        case "not-found" | "masked":
            return None
        case other:
            raise Unreadable(f"{block['Id']} is {other}")
