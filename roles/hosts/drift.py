"""How /etc/hosts of a node differs from the cluster file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from inventory.cluster import Node
from roles.core.role import Finding, Peers, Target
from roles.core.steps import block_lines, managed_block
from roles.hosts.probe import HostsState
from roles.hosts.spec import HostsSpec

BLOCK = "hosts"


def wanted_lines(target: Target[HostsSpec], state: HostsState, peers: Peers) -> list[str]:
    """One line a node: address, the node's name, and its own host name where that is another.

    A peer that cannot be read keeps the line it has, so that a dead node changes nothing.
    """
    present = {
        line.split()[0]: line for line in block_lines(state.text, BLOCK) or [] if line.split()
    }
    hostnames: Mapping[str, str] = {
        target.node.name: state.hostname,
        **{node.name: peers[node.name].hostname for node in target.others if node.name in peers},
    }
    lines = []
    for node in target.cluster.nodes.values():
        kept = present.get(node.address, "")
        if node.name not in hostnames and node.name in kept.split():
            lines.append(kept)
        else:
            own = hostnames.get(node.name, node.name)
            usable = own.split(".")[0] not in ("", "localhost") and own not in target.cluster.nodes
            lines.append(" ".join([node.address, node.name, *([own] if usable else [])]))
    return lines


def without_strays(text: str, names: Mapping[str, str]) -> tuple[str, list[str]]:
    """The text without names that point elsewhere, and the lines that held one.

    names: host name to its right address. Debian's ``127.0.1.1 node1`` is such a line: a rank
    that resolves its own name to it advertises a loopback address, and the rendezvous hangs.
    Names are taken out of their lines; a line left without names goes.
    """
    kept: list[str] = []
    strays: list[str] = []
    for line in text.splitlines():
        words = line.split("#", 1)[0].split()
        wrong = [word for word in words[1:] if word in names and words[0] != names[word]]
        if not wrong:
            kept.append(line)
            continue
        strays.append(line.strip())
        rest = [word for word in words[1:] if word not in wrong]
        if rest:
            kept.append(" ".join([words[0], *rest]))
    return "\n".join(kept) + ("\n" if kept else ""), strays


def right_text(target: Target[HostsSpec], state: HostsState, peers: Peers) -> tuple[str, list[str]]:
    """/etc/hosts as it should be, and the lines that mislead."""
    lines = wanted_lines(target, state, peers)
    names = {name: line.split()[0] for line in lines for name in line.split()[1:]}
    outside = managed_block(state.text, BLOCK, [])
    cleaned, strays = without_strays(outside, names)
    if not strays:
        cleaned = state.text
    return managed_block(cleaned, BLOCK, lines), strays


def drift(target: Target[HostsSpec], state: HostsState, peers: Peers) -> list[Finding]:
    """Findings: missing or old entries, names that resolve elsewhere, one name on two nodes."""
    return list(_findings(target, state, peers))


def _findings(target: Target[HostsSpec], state: HostsState, peers: Peers) -> Iterator[Finding]:
    lines = wanted_lines(target, state, peers)
    present = block_lines(state.text, BLOCK)
    if present != lines:
        missing = [line for line in lines if line not in (present or [])]
        left = [line for line in present or [] if line not in lines]
        seen = (
            f"{len(missing)} missing, {len(left)} too many"
            if present is not None
            else "no such block"
        )
        yield Finding(
            "hostname-unresolvable",
            f"{len(lines)} nodes in /etc/hosts",
            seen,
            "the block in /etc/hosts is written",
        )
    for stray in right_text(target, state, peers)[1]:
        yield Finding(
            "hostname-loopback" if stray.startswith(("127.", "::1")) else "hosts-conflict",
            f"{target.node.name} names resolve to the declared addresses",
            stray,
            "the name is taken out of that line",
        )
    if state.cloud_init:
        yield Finding(
            "cloud-init-hosts",
            "/etc/hosts survives a reboot",
            "cloud-init may write it again",
            "manage_etc_hosts is set to false",
        )
    twins = [node.name for node in target.others if _same_name(node, state, peers)]
    if twins:
        yield Finding(
            "duplicate-hostname",
            "a host name of its own",
            f"{state.hostname}, as {', '.join(twins)}",
            f"run 'hostnamectl set-hostname {target.node.name}' on this node",
            repairable=False,
        )


def _same_name(node: Node, state: HostsState, peers: Peers) -> bool:
    return node.name in peers and peers[node.name].hostname == state.hostname
