"""How the network of a node differs from one over which the others reach it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.network.interfaces import exactly
from roles.network.names import OF_ONE_NODE, meant
from roles.network.probe import COMMENT, NCCL_CONF, Chain, Firewall, NetworkState, Setting
from roles.network.spec import NetworkSpec

KEY = "NCCL_SOCKET_IFNAME"

INTERNAL = re.compile(
    r"lo|docker\d*|docker_gwbridge|virbr\d+(-nic)?|br-[0-9a-f]{12}|veth\w+|cni\d+"
)
"""Interfaces that lead to containers and virtual machines of the same host, never to a peer."""

SINGLE = re.compile(
    r"\s*(?:export\s+)?[A-Za-z_][A-Za-z0-9_]*=(?:\"[^\"]*\"|'[^']*'|[^\s;&|]*)\s*;?\s*"
)
"""A line that sets one variable and does nothing else."""


def drift(target: Target[NetworkSpec], state: NetworkState, peers: Peers) -> list[Finding]:
    """Findings: an unproved change, no or another interface with the address, nccl.conf, leaks, MTU, the firewall."""
    wrong = list(_interface(target, state))
    return [
        *_undoing(state),
        *(wrong or [*_conf(state), *_mtu(target, state, peers)]),
        *_leaks(target, state),
        *_firewall(target, state),
    ]


def _undoing(state: NetworkState) -> Iterator[Finding]:
    if state.undoing:
        yield Finding(
            "network-undo",
            "an MTU and a firewall that stay as they are",
            "a change of an interrupted run, which undoes itself within a minute",
            "the change is kept, once a login succeeds",
        )


def _interface(target: Target[NetworkSpec], state: NetworkState) -> Iterator[Finding]:
    node = target.node
    names = state.carriers.get(node.address, ())
    want = f"an interface with {node.address}"
    if not names:
        yield _for_user(
            "nccl-wrong-interface",
            want,
            f"none; there are {', '.join(f'{a} on {n}' for a, n in _outward(state)) or 'no others'}",
            "correct the node's address in the cluster file, or give the node that address",
        )
        return
    if node.interface and node.interface not in names:
        exists = node.interface in state.links
        yield _for_user(
            "nccl-wrong-interface" if exists else "nccl-ifname-missing",
            f"{node.address} on {node.interface}",
            f"{node.address} on {', '.join(names)}"
            + ("" if exists else f", and no {node.interface}"),
            f"take interface out of {node.name} in the cluster file, or name the right one",
        )
        return
    if len(names) > 1 and not node.interface:
        yield _for_user(
            "nccl-wrong-interface",
            f"{node.address} on one interface",
            f"on {', '.join(names)}",
            f"name the interface of {node.name} in the cluster file, or take the address off the others",
        )
        return
    name = node.interface or names[0]
    if INTERNAL.fullmatch(name):
        yield _for_user(
            "nccl-wrong-interface",
            "an interface that leads to the other nodes",
            f"{node.address} on {name}, which ends on this host",
            "declare the address by which the other nodes reach this one",
        )
        return
    if name in state.links and not state.links[name].up:
        yield _for_user(
            "nccl-wrong-interface",
            f"{name} up",
            f"{name} is down, or its cable is out",
            "bring the interface up on this node",
        )
        return
    astray = [
        f"{peer.name} {f'over {way}' if way else 'not at all'}"
        for peer in target.others
        if peer.address != node.address and (way := state.routes.get(peer.address)) != name
    ]
    if astray:
        yield _for_user(
            "nccl-wrong-interface",
            f"the other nodes reached over {name}",
            ", ".join(astray),
            "correct the routes of this node (ip route get ADDRESS), or the addresses in the cluster file",
        )


def _outward(state: NetworkState) -> list[tuple[str, str]]:
    return [
        (address, name)
        for address, names in state.carriers.items()
        for name in names
        if not INTERNAL.fullmatch(name) and not address.startswith("fe80:")
    ]


def other_settings(state: NetworkState) -> str:
    """What /etc/nccl.conf sets beside the interface; two nodes that differ in it may hang."""
    found = [
        f"{key}={value}"
        for key, value in state.conf
        if key not in OF_ONE_NODE and not key.startswith("NCCL_DEBUG")
    ]
    return " ".join(sorted(found)) or "none"


def _conf(state: NetworkState) -> Iterator[Finding]:
    name = state.interface
    if name is None:
        return
    values = [value for key, value in state.conf if key == KEY]
    if values == [exactly(name)]:
        return
    named = {part for value in values for part in value.lstrip("=^").split(",")}
    absent = bool(named) and not any(
        link.startswith(part) for part in named for link in state.links
    )
    yield Finding(
        "nccl-ifname-missing" if absent else "nccl-wrong-interface",
        f"{KEY}={exactly(name)} in {NCCL_CONF}",
        " and ".join(f"{KEY}={value}" for value in values) or "no such line",
        "the line is written; others of that file stay",
    )


def _mtu(target: Target[NetworkSpec], state: NetworkState, peers: Peers) -> Iterator[Finding]:
    name = state.interface
    if name is None or state.mtu is None:
        return
    mtu, wanted = state.mtu, target.spec.mtu
    if wanted is not None:
        if mtu != wanted:
            yield Finding(
                "mtu-mismatch",
                f"MTU {wanted} on {name}",
                str(mtu),
                "it is set, and a unit sets it again at each boot",
                disturbs=True,
            )
    elif (head := _head_mtu(target, peers)) is not None and mtu != head:
        yield _for_user(
            "mtu-mismatch",
            f"MTU {head} on {name}, as {target.cluster.head.name} has",
            str(mtu),
            "declare network.mtu, or set the MTU in this node's own configuration",
        )
    if state.mtu_unit not in (None, wanted):
        yield Finding(
            "mtu-mismatch",
            "nothing that sets another MTU at boot",
            f"lockstep-mtu.service sets {state.mtu_unit}",
            "the unit is taken out, or written anew",
        )


def _head_mtu(target: Target[NetworkSpec], peers: Peers) -> int | None:
    head = target.cluster.head
    if target.is_head or head.name not in peers:
        return None
    state: NetworkState = peers[head.name]
    return state.mtu


def leaks(state: NetworkState) -> list[Setting]:
    """Lines that give every process of a login what holds for one node only, or a misspelt name."""
    return [each for each in state.settings if each.name in OF_ONE_NODE or meant(each.name)]


def removable(setting: Setting) -> bool:
    """The line sets this variable and does nothing else."""
    return bool(SINGLE.fullmatch(setting.line)) and "?" not in setting.line


def _leaks(target: Target[NetworkSpec], state: NetworkState) -> Iterator[Finding]:
    for each in leaks(state):
        right = meant(each.name)
        remove = target.spec.leaks == "remove"
        yield Finding(
            "env-var-typo" if right else "nccl-env-inconsistent",
            f"a name that NCCL reads, as {right}" if right else f"{each.name} set for no login",
            str(each),
            "the line is taken out; a copy of the file stays beside it"
            if remove and removable(each)
            else f"take it out of {each.path}"
            + ("" if remove or not removable(each) else ", or declare network.leaks: remove"),
            repairable=remove and removable(each),
        )
    for name, _ in state.conf:
        if right := meant(name):
            yield _for_user(
                "env-var-typo",
                f"a name that NCCL reads, as {right}",
                f"{name} in {NCCL_CONF}",
                f"correct the name in {NCCL_CONF} on this node",
            )


def own_rules(chain: Chain) -> list[str]:
    """Lockstep's rules in a chain."""
    return [rule for rule in chain.rules if f'comment "{COMMENT}"' in rule]


def closed(chain: Chain) -> bool:
    """Something in the chain may turn a peer away.

    Rules that iptables made are left out: they cannot be told apart from here, and mixing ours in
    would make iptables refuse to show them. The proof finds what they turn away.
    """
    foreign = chain.table == "filter" and chain.name == "INPUT"
    stops = any(re.search(r"\b(drop|reject|jump|goto|queue)\b", rule) for rule in chain.rules)
    return not foreign and (chain.policy == "drop" or stops)


def rules(interface: str, addresses: Sequence[str]) -> list[str]:
    """The rules of nftables that let the peers in, as ``nft list`` prints them.

    And the node itself: its ranks meet at its own address, which it reaches over the loopback.
    """
    from_peers = (
        f'iifname "{interface}" {"ip6" if ":" in address else "ip"} saddr {address}'
        for address in addresses
    )
    return [f'{each} accept comment "{COMMENT}"' for each in ('iifname "lo"', *from_peers)]


def _firewall(target: Target[NetworkSpec], state: NetworkState) -> Iterator[Finding]:
    wall, name = state.firewall, state.interface
    if wall is None or wall.kind == "none" or name is None:
        return
    addresses = [node.address for node in target.others]
    if wall.kind == "nftables":
        wanted = sorted(rules(name, addresses))
        said = list(_nftables(wall, wanted))
        if said:
            yield _wall("; ".join(said))
    elif wall.allowed != frozenset(addresses):
        missing = [address for address in addresses if address not in wall.allowed]
        left = sorted(wall.allowed - set(addresses))
        said = [
            *([f"{wall.kind} does not let in {', '.join(missing)}"] if missing else []),
            *([f"{wall.kind} still lets in {', '.join(left)}"] if left else []),
        ]
        yield _wall("; ".join(said))


def _nftables(wall: Firewall, wanted: list[str]) -> Iterator[str]:
    """What is wrong with the rules in force and with those of the next boot. wanted: sorted."""
    guarded = [chain for chain in wall.chains if closed(chain)]
    shut = [
        chain
        for chain in guarded
        if sorted(own_rules(chain)) != wanted or sorted(chain.rules[: len(wanted)]) != wanted
    ]
    if shut:
        yield f"chain {_names(shut)} of nftables does not let them in first"
    old = [
        chain
        for chain in wall.chains
        if chain not in guarded and own_rules(chain) and sorted(own_rules(chain)) != wanted
    ]
    if old:
        yield f"older rules of Lockstep in chain {_names(old)} of nftables"
    if (guarded or wall.boot) and sorted(wall.boot) != wanted:
        yield "other rules from the next boot on" if wall.boot else "no rules from the next boot on"


def _names(chains: Sequence[Chain]) -> str:
    return ", ".join(f"{chain.family} {chain.table} {chain.name}" for chain in chains)


def _wall(seen: str) -> Finding:
    return Finding(
        "firewall-between-nodes",
        "the other nodes let in, and nobody else on their account",
        seen,
        "rules for their addresses are written; they undo themselves unless a fresh login succeeds",
    )


def _for_user(id: str, want: str, seen: str, fix: str) -> Finding:
    return Finding(id, want, seen, fix, repairable=False)
