"""Writes the interface for NCCL, takes leaks out, sets the MTU, opens the firewall between the nodes.

What touches the path of packets undoes itself after a minute unless a fresh login succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import NewLogin, Shell, Step, quote, write_file
from roles.network.drift import KEY, leaks, removable, rules
from roles.network.interfaces import exactly
from roles.network.names import meant
from roles.network.probe import (
    COMMENT,
    FIREWALL_SCRIPT,
    FIREWALL_UNIT,
    MTU_UNIT,
    NCCL_CONF,
    UNDOING,
    NetworkState,
    Setting,
)
from roles.network.spec import NetworkSpec

UNDO_SECONDS = 60
KEEP = Shell(f"rm -f {UNDOING}")

DATA_FILES = (".nccl.conf", ".deepspeed_env", "/etc/environment")
"""Not read by a shell: a line is taken out whole. Of a script, something must stay where it was, or
an ``if`` around it would be empty, which is an error of syntax."""


def converge(
    target: Target[NetworkSpec], state: NetworkState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Files first; then what is guarded by a new login."""
    ids = {finding.id for finding in findings}
    if "network-undo" in ids:
        yield NewLogin()
        yield KEEP
    name = state.interface
    if name is not None and any(finding.want.startswith(f"{KEY}=") for finding in findings):
        yield Shell(write_conf(name))
    if ids & {"nccl-env-inconsistent", "env-var-typo"} and target.spec.leaks == "remove":
        for each in leaks(state):
            if removable(each):
                yield Shell(take_out(each))
    if "mtu-mismatch" in ids and name is not None:
        yield from _mtu(target, state, name)
    if "firewall-between-nodes" in ids and name is not None and state.firewall is not None:
        yield from guarded(*_firewall(target, state, name))


def write_conf(interface: str) -> str:
    """Shell that makes /etc/nccl.conf name the interface once; all other lines stay.

    NCCL takes the first line of a name, trims nothing and knows no quotes.
    """
    conf, line = quote(NCCL_CONF), quote(f"{KEY}={exactly(interface)}")
    return (
        f"conf=$(readlink -f {conf})\n"
        'if test -e "$conf"; then test -e "$conf.before-lockstep" || cp -p "$conf" "$conf.before-lockstep"; '
        'else (umask 022; : > "$conf"); fi\n'
        'cp -p "$conf" "$conf.lockstep-new"\n'
        f'awk \'!/^{KEY}=/\' "$conf" > "$conf.lockstep-new"\n'
        f"printf '%s\\n' {line} >> \"$conf.lockstep-new\"\n"
        'chmod a+r "$conf.lockstep-new"; mv -f "$conf.lockstep-new" "$conf"'
    )


def take_out(setting: Setting) -> str:
    """Shell that disables every line that reads exactly so, in one file."""
    why = f"misspelt {meant(setting.name)}" if meant(setting.name) else "of one node only"
    plain = setting.path.endswith(DATA_FILES)
    instead = "" if plain else f": # taken out by Lockstep ({why}): {setting.line.strip()}"
    return (
        f"file=$(readlink -f {quote(setting.path)})\n"
        'test -e "$file.before-lockstep" || cp -p "$file" "$file.before-lockstep"\n'
        'cp -p "$file" "$file.lockstep-new"\n'
        f"LINE={quote(setting.line)} INSTEAD={quote(instead)} awk '\n"
        '$0 == ENVIRON["LINE"] { if (ENVIRON["INSTEAD"] != "") print ENVIRON["INSTEAD"]; next }\n'
        '{ print }\' "$file" > "$file.lockstep-new"\n'
        'mv -f "$file.lockstep-new" "$file"'
    )


def guarded(change: str, undo: str) -> tuple[Step, Step, Step]:
    """The change, a fresh login, and what keeps the change; without the last two it is undone."""
    make = (
        "dir=$(mktemp -d /run/lockstep-network.XXXXXX)\n"
        f"printf '%s\\n' {quote(undo)} > \"$dir/run\"\n"
        f'setsid sh -c \'sleep {UNDO_SECONDS}; if test -e "$1/run"; then sh "$1/run"; fi; rm -rf "$1"\' '
        'undo "$dir" </dev/null >/dev/null 2>&1 &\n'
        f"{change}"
    )
    return Shell(make, seconds=120), NewLogin(), KEEP


def _mtu(target: Target[NetworkSpec], state: NetworkState, name: str) -> Iterator[Step]:
    wanted, seen = target.spec.mtu, state.links[name].mtu
    if wanted is None or (seen == wanted and state.mtu_unit not in (None, wanted)):
        yield Shell(
            f"systemctl disable -q {MTU_UNIT.rpartition('/')[2]} || :\nrm -f {MTU_UNIT}\nsystemctl daemon-reload"
        )
    if wanted is not None and seen != wanted:
        yield from guarded(
            f"ip link set dev {quote(name)} mtu {wanted}",
            f"ip link set dev {quote(name)} mtu {seen}",
        )
        yield Shell(enable(MTU_UNIT, mtu_unit(name, wanted)))


def mtu_unit(name: str, mtu: int) -> str:
    """The unit that sets the MTU at boot, whatever configures the network on this system."""
    return (
        "[Unit]\nDescription=MTU of the training network (Lockstep)\n"
        "After=network.target network-online.target\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        # systemd takes "%" for a specifier; nothing else of an interface's name means anything to it
        f"ExecStart=/usr/bin/env ip link set dev {name.replace('%', '%%')} mtu {mtu}\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def enable(path: str, text: str) -> str:
    """Shell that writes a unit and enables it for the next boot."""
    return (
        f"{write_file(path, text, backup=False)}\nsystemctl daemon-reload\n"
        f"systemctl enable -q {path.rpartition('/')[2]}"
    )


def _firewall(target: Target[NetworkSpec], state: NetworkState, name: str) -> tuple[str, str]:
    """Shell that lets exactly the peers in, and shell that brings back what was there before."""
    wall = state.firewall
    assert wall is not None
    addresses = [node.address for node in target.others]
    before = sorted(wall.allowed)
    match wall.kind:
        case "firewalld":
            return _firewalld(addresses), _firewalld(before) if before else _no_firewalld()
        case "ufw":
            return _ufw(before, addresses), _ufw(addresses, before)
        case _:
            return _nftables(rules(name, addresses)), (
                _nftables(wall.boot) if wall.boot else _no_nftables()
            )


def _nftables(lines: Sequence[str]) -> str:
    script = write_file(FIREWALL_SCRIPT, nft_script(lines), "0755", False)
    return f"{script}\n{enable(FIREWALL_UNIT, firewall_unit())}\n{FIREWALL_SCRIPT}"


def _no_nftables() -> str:
    unit = FIREWALL_UNIT.rpartition("/")[2]
    return f"systemctl disable -q {unit}; rm -f {FIREWALL_UNIT}\n{FIREWALL_SCRIPT} undo\nrm -f {FIREWALL_SCRIPT}"


def _ufw(before: Sequence[str], addresses: Sequence[str]) -> str:
    return "\n".join(
        [
            *(
                f"ufw allow from {each} comment {COMMENT}"
                for each in addresses
                if each not in before
            ),
            *(f"ufw delete allow from {each}" for each in before if each not in addresses),
        ]
    )


FIREWALLD_SETS = ((COMMENT, "inet"), (f"{COMMENT}6", "inet6"))
"""The sets of addresses that firewalld trusts: name and family."""


def _firewalld(addresses: Sequence[str]) -> str:
    lines = []
    for name, family in FIREWALLD_SETS:
        members = [each for each in addresses if (":" in each) == (family == "inet6")]
        if not members and name != COMMENT:
            lines.append(_without(name))
            continue
        text = (
            '<?xml version="1.0" encoding="utf-8"?>\n<ipset type="hash:ip">\n'
            f'  <option name="family" value="{family}"/>\n'
            + "".join(f"  <entry>{each}</entry>\n" for each in members)
            + "</ipset>\n"
        )
        source = f"ipset:{name}"
        asked = f"firewall-cmd -q --permanent --zone=trusted --query-source={source}"
        # A source is known to firewalld only once its set is loaded.
        lines += [
            write_file(f"/etc/firewalld/ipsets/{name}.xml", text, backup=False),
            "firewall-cmd -q --reload",
            f"{asked} || firewall-cmd -q --permanent --zone=trusted --add-source={source}",
        ]
    return "\n".join([*lines, "firewall-cmd -q --reload"])


def _without(name: str) -> str:
    """Shell that takes a set away. A zone that names a set without its file does not load."""
    return (
        f"if grep -qs 'ipset=\"{name}\"' /etc/firewalld/zones/trusted.xml; then\n"
        f"  firewall-cmd -q --permanent --zone=trusted --remove-source=ipset:{name}; fi\n"
        f"rm -f /etc/firewalld/ipsets/{name}.xml"
    )


def _no_firewalld() -> str:
    gone = [_without(name) for name, _ in FIREWALLD_SETS]
    return "\n".join([*gone, "firewall-cmd -q --reload"])


def firewall_unit() -> str:
    """The unit that puts the rules in again at boot, after whoever else writes some."""
    return (
        "[Unit]\nDescription=Firewall open between the training nodes (Lockstep)\n"
        "After=nftables.service netfilter-persistent.service\nPartOf=nftables.service\n\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart={FIREWALL_SCRIPT}\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


def nft_script(lines: Sequence[str]) -> str:
    """The program that puts the rules first in every chain that judges what comes in.

    An "accept" in a chain of our own would not do: any later chain may still drop the packet.
    With an argument it only takes the rules out.
    """
    inserts = "\n".join(
        f'  nft insert rule "$1" "$2" "$3" {quote(line)}' for line in reversed(lines)
    )
    return rf"""#!/bin/sh
# Written by Lockstep; changes are lost.
set -e
add() {{
  :
{inserts}
}}
nft -a list ruleset | awk '
$1 == "table" {{ table = $2 " " $3 }}
$1 == "chain" {{ chain = $2; inside = 0 }}
/ hook input / {{ inside = 1; if (table !~ / filter$/ || chain != "INPUT") print "chain", table, chain }}
inside && /comment "{COMMENT}"/ {{ print "old", table, chain, $NF }}' |
while read -r what family table chain handle; do
  case $what in
    old) nft delete rule "$family" "$table" "$chain" handle "$handle" ;;
    chain) test $# -gt 0 || add "$family" "$table" "$chain" ;;
  esac
done
"""
