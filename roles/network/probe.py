"""A node's addresses and interfaces, its ways to the peers, and who else sets variables of NCCL there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from roles.core.logins import startup_files
from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.network import interfaces
from roles.network.spec import NetworkSpec

NCCL_CONF = "/etc/nccl.conf"
MTU_UNIT = "/etc/systemd/system/lockstep-mtu.service"
FIREWALL_UNIT = "/etc/systemd/system/lockstep-firewall.service"
FIREWALL_WANTED = "/etc/systemd/system/multi-user.target.wants/lockstep-firewall.service"
FIREWALL_SCRIPT = "/usr/local/sbin/lockstep-firewall"
UNDOING = "/run/lockstep-network.*/run"
"""What takes a change back, until a fresh login has proved it."""
COMMENT = "lockstep"
"""By this the rules of a firewall that are Lockstep's own are known."""

SECTIONS = ("own", "undoing", "addresses", "links", "routes", "files", "firewall")

_SETTING = re.compile(
    r"(?:^|[\s;&|(])((?:NCCL_[A-Za-z0-9_]+)|GLOO_SOCKET_IFNAME|TP_SOCKET_IFNAME)="
    r"(\"[^\"]*\"|'[^']*'|[^\s;&|)]*)"
)


@dataclass(frozen=True)
class Link:
    """An interface. mtu: bytes. up: it is switched on and its cable is plugged in."""

    mtu: int
    up: bool


@dataclass(frozen=True)
class Setting:
    """A variable that a start-up file sets. line: the whole line, bytes above 127 as "?"."""

    path: str
    line: str
    name: str
    value: str

    def __str__(self) -> str:
        return f"'{self.line.strip()}' in {self.path}"


@dataclass(frozen=True)
class Chain:
    """A chain of nftables that judges what comes in. rules: as ``nft list`` prints them."""

    family: str
    table: str
    name: str
    policy: str
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Firewall:
    """kind: what guards the node. allowed: addresses that Lockstep's rules let in (not for nftables).

    chains: those of nftables. boot: the rules that Lockstep's own program puts in at each boot.
    """

    kind: str
    allowed: frozenset[str] = frozenset()
    chains: tuple[Chain, ...] = ()
    boot: tuple[str, ...] = ()


@dataclass(frozen=True)
class NetworkState:
    """carriers: address to the interfaces that carry it. links: by interface.
    interface: the one that the peers reach; None where it is not known.

    routes: a peer's address to the interface that leads there; a peer without a way is absent.
    conf: the settings of /etc/nccl.conf as NCCL reads them, in their order. settings: of other files.
    mtu_unit: the MTU that Lockstep's unit sets at boot. firewall: None where it was not asked for.
    undoing: an interrupted run left a change that no login proved, and that undoes itself soon.
    """

    carriers: Mapping[str, tuple[str, ...]]
    links: Mapping[str, Link]
    interface: str | None
    routes: Mapping[str, str]
    conf: tuple[tuple[str, str], ...]
    settings: tuple[Setting, ...]
    mtu_unit: int | None = None
    firewall: Firewall | None = None
    undoing: bool = False

    @property
    def mtu(self) -> int | None:
        """The largest packet of the interface that the peers reach."""
        link = self.links.get(self.interface or "")
        return None if link is None else link.mtu


FILES = r"""
test $# = 0 || awk -v conf="$conf" -v unit="$unit" '
function show() { gsub(/[\200-\377]/, "?"); print FILENAME "\t" $0 }
FILENAME == conf { if (/^[^#]*=/) show(); next }
FILENAME == unit { if (/ mtu [0-9]+$/) show(); next }
/^[ \t]*(: )?#/ { next }
/(NCCL_[A-Za-z0-9_]+|GLOO_SOCKET_IFNAME|TP_SOCKET_IFNAME)=/ { show() }
' "$@" || exit 3
"""

FIREWALL = r"""
echo firewall
if test -d /run/firewalld || test -e /etc/firewalld/firewalld.conf && systemctl is-active -q firewalld; then
  echo kind firewalld
  if test -e /etc/firewalld/ipsets/lockstep.xml && grep -q 'ipset="lockstep"' /etc/firewalld/zones/trusted.xml 2>/dev/null
  then sed -n 's/.*<entry>\(.*\)<\/entry>.*/allowed \1/p' /etc/firewalld/ipsets/lockstep*.xml || exit 3; fi
elif test -e /etc/ufw/ufw.conf && grep -qi '^ENABLED=yes' /etc/ufw/ufw.conf; then
  echo kind ufw
  cat /etc/ufw/user.rules /etc/ufw/user6.rules | awk -v mark="comment=$mark" \
    '$2 == "tuple" && $4 == "allow" && $NF == mark { print "allowed", $9 }' || exit 3
elif command -v nft >/dev/null; then
  echo kind nftables
  found=$(nft list ruleset) || exit 3
  printf '%s\n' "$found" | awk '
  $1 == "table" { table = $2 " " $3 }
  $1 == "chain" { chain = $2 }
  $1 == "}" { inside = 0 }
  inside { print "rule", $0 }
  / hook input / { inside = 1; policy = "accept"; if (/policy drop/) policy = "drop"; print "chain", table, chain, policy }'
  if test -e "$wanted" && test -e "$program"; then
    while IFS= read -r line; do
      case $line in *" nft insert rule "*) line=${line#*\'}; printf 'boot %s\n' "${line%\'}" ;; esac
    done <"$program"
  fi
else
  echo kind none
fi
"""


def probe(target: Target[NetworkSpec]) -> str:
    """Sections, each after a line with its name; ``undoing`` and ``firewall`` only where there is one."""
    peers = " ".join(quote(node.address) for node in target.others)
    lines = [
        "export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin",
        f"conf={NCCL_CONF} unit={MTU_UNIT} mark={COMMENT.encode().hex()}",
        f"echo own; echo {quote(target.node.address)}",
        f"echo {quote(target.node.interface)}" if target.node.interface else "",
        f'for each in {UNDOING}; do if test -e "$each"; then echo undoing; break; fi; done',
        "echo addresses",
        interfaces.SHOW.strip(),
        "echo links",
        "ip -o link show || exit 3",
        "echo routes",
        # Without a way ip says so, and goes on with the next; its exit status then says nothing.
        f"printf 'route get %s\\n' {peers} | ip -o -force -batch - 2>&1" if peers else "",
        "echo files",
        startup_files(target.node.ssh.user, NCCL_CONF, MTU_UNIT),
        FILES.strip(),
        f"wanted={FIREWALL_WANTED} program={FIREWALL_SCRIPT}\n{FIREWALL.strip()}"
        if target.spec.firewall == "open"
        else "",
        "echo end",
    ]
    return "\n".join(line for line in lines if line)


@whole
def parse(text: str) -> NetworkState:
    """The state that ``probe`` printed."""
    sections: dict[str, list[str]] = {}
    name = ""
    for line in text.split("\n"):
        if line in SECTIONS:
            name = line
            sections[name] = []
        elif not name:
            raise Unreadable(f"{line[:60]!r} is not understood")
        else:
            sections[name].append(line)
    carriers: dict[str, tuple[str, ...]] = {}
    for line in sections["addresses"]:
        address, carrier = interfaces.pair(line.removeprefix("address "))
        carriers[address] = (*carriers.get(address, ()), carrier)
    links = dict(_link(line) for line in sections["links"])
    if not carriers or not links:
        raise Unreadable("the node shows no address at all")
    address, *declared = sections["own"]
    if not re.fullmatch(r"[0-9a-f.:]+", address):
        raise Unreadable(f"{address[:60]!r} is no address")
    names = carriers.get(address, ())
    if missing := set(names) - links.keys():
        raise Unreadable(f"{', '.join(missing)} carries {address} and is not among the interfaces")
    conf, settings, unit = _files(sections["files"])
    return NetworkState(
        carriers=carriers,
        links=links,
        interface=declared[0] if declared else names[0] if len(names) == 1 else None,
        routes=dict(_routes(sections["routes"])),
        conf=conf,
        settings=settings,
        mtu_unit=unit,
        firewall=_firewall(sections["firewall"]) if "firewall" in sections else None,
        undoing="undoing" in sections,
    )


def _link(line: str) -> tuple[str, Link]:
    match = re.match(r"\d+: ([^\s:@]+)(?:@\S+)?: <([A-Z0-9_,-]*)> mtu (\d+) ", line)
    if match is None:
        raise Unreadable(f"{line[:60]!r} is no interface")
    flags = match[2].split(",")
    return match[1], Link(int(match[3]), "UP" in flags and "LOWER_UP" in flags)


def _routes(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        match = re.match(r"(?:local )?([0-9a-f.:]+) (?:.* )?dev (\S+)", line)
        if match:
            yield match[1], match[2]
        elif not re.search(r"unreachable|Command failed|prohibit|blackhole|Invalid|No route", line):
            raise Unreadable(f"{line[:60]!r} is no route")


def _files(
    lines: Sequence[str],
) -> tuple[tuple[tuple[str, str], ...], tuple[Setting, ...], int | None]:
    conf: list[tuple[str, str]] = []
    settings: list[Setting] = []
    unit: int | None = None
    for each in lines:
        path, tab, line = each.partition("\t")
        if not tab:
            raise Unreadable(f"{each[:60]!r} belongs to no file")
        if path == NCCL_CONF:
            name, _, value = line.partition("=")
            conf.append((name, value))
        elif path == MTU_UNIT:
            unit = int(line.rsplit(" ", 1)[1])
        else:
            settings += [
                Setting(path, line, match[1], match[2].strip("\"'"))
                for match in _SETTING.finditer(line)
            ]
    return tuple(conf), tuple(settings), unit


def _firewall(lines: Sequence[str]) -> Firewall:
    kind = ""
    allowed: set[str] = set()
    chains: list[Chain] = []
    boot: list[str] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "kind" and rest in ("firewalld", "ufw", "nftables", "none"):
            kind = rest
        elif word == "allowed":
            allowed.add(rest.split("/")[0])
        elif word == "boot":
            boot.append(rest)
        elif word == "chain":
            family, table, name, policy = rest.split(" ")
            chains.append(Chain(family, table, name, policy, ()))
        elif word == "rule" and chains:
            last = chains[-1]
            rules = (*last.rules, rest.strip())
            chains[-1] = Chain(last.family, last.table, last.name, last.policy, rules)
        else:
            raise Unreadable(f"{line[:60]!r} is no part of a firewall")
    if not kind:
        raise Unreadable("the firewall is not shown")
    return Firewall(kind, frozenset(allowed), tuple(chains), tuple(boot))
