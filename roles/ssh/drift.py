"""How root's ssh between the nodes differs from: the head's key opens every node, every host key is known."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from inventory.cluster import Node
from roles.core.role import Finding, Peers, Target
from roles.core.steps import block_lines, managed_block
from roles.ssh.probe import (
    CLIENT_CONFIG,
    CLIENT_FILE,
    KNOWN_HOSTS,
    SERVER_CONFIG,
    SERVER_FILE,
    PublicKey,
    SshState,
)
from roles.ssh.spec import SshSpec

BLOCK = "ssh"
HEADER = "# Written by Lockstep from the cluster file; what is changed here is overwritten."
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def host_field(names: list[str], port: int) -> str:
    """The first field of a known_hosts line; a port other than 22 is part of each name."""
    return ",".join(names if port == 22 else [f"[{name}]:{port}" for name in names])


def is_name(name: str, entry: str) -> bool:
    """A name of a known_hosts line, hashed or not, is this entry."""
    if not name.startswith("|1|"):
        return name == entry
    try:
        salt, digest = (base64.b64decode(word, validate=True) for word in name.split("|")[2:])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, entry.encode(), hashlib.sha1).digest(), digest)


def names_in(line: str) -> list[str]:
    """The names in the first field of a known_hosts line, without their ports."""
    fields = line.split()
    return (
        [re.sub(r"^\[(.*)\]:\d+$", r"\1", name) for name in fields[0].split(",")] if fields else []
    )


def kept_lines(state: SshState, node: Node) -> list[str]:
    """The lines of a node in the block that is there now; the node's name comes first in each."""
    lines = block_lines(state.text(KNOWN_HOSTS), BLOCK) or []
    return [line for line in lines if len(line.split()) == 3 and names_in(line)[:1] == [node.name]]


def names_of(target: Target[SshSpec], node: Node, state: SshState, peers: Peers) -> list[str]:
    """What a node is called: its name, its address, and its own host name where that is another.

    The own name of a peer that cannot be read is taken from the lines that are there.
    """
    names = [node.name, node.address]
    if node.name == target.node.name:
        own = [state.hostname]
    elif node.name in peers:
        own = [peers[node.name].hostname]
    else:
        own = [name for line in kept_lines(state, node)[:1] for name in names_in(line)[2:]]
    usable = [
        name
        for name in own
        if HOST_NAME.fullmatch(name) and name not in (*names, "localhost", *target.cluster.nodes)
    ]
    return [*names, *usable]


def wanted_known_hosts(target: Target[SshSpec], state: SshState, peers: Peers) -> list[str]:
    """One line for each host key of each node; a peer that cannot be read keeps the keys it has."""
    lines = []
    for node in target.cluster.nodes.values():
        seen: SshState | None = state if node.name == target.node.name else peers.get(node.name)
        keys = (
            [PublicKey(*line.split()[1:]) for line in kept_lines(state, node)]
            if seen is None
            else seen.host_keys
        )
        field = host_field(names_of(target, node, state, peers), node.ssh.port)
        lines += [f"{field} {key.type} {key.blob}" for key in keys]
    return lines


def stale_lines(
    target: Target[SshSpec], state: SshState, peers: Peers
) -> Mapping[str, Mapping[str, str]]:
    """Path to the lines that give a node a key which is not its own, each with what may stay of it.

    Such a key stays trusted: whoever holds it is taken for the node. Lockstep's own block is left out.
    """
    own: dict[str, set[PublicKey]] = {}
    for node in target.cluster.nodes.values():
        seen: SshState | None = state if node.name == target.node.name else peers.get(node.name)
        if seen is not None and seen.host_keys:
            for name in names_of(target, node, state, peers):
                own[host_field([name], node.ssh.port)] = set(seen.host_keys)
    found: dict[str, dict[str, str]] = {}
    for path in (KNOWN_HOSTS, state.own_known_hosts):
        for line in managed_block(state.text(path), BLOCK, []).splitlines():
            words = line.split()
            if len(words) < 3 or line.lstrip().startswith(("#", "@")):
                continue
            key, names = PublicKey(words[1], words[2]), words[0].split(",")
            wrong = [
                name
                for name in names
                if any(is_name(name, entry) and key not in keys for entry, keys in own.items())
            ]
            if wrong:
                rest = ",".join(name for name in names if name not in wrong)
                found.setdefault(path, {})[line] = " ".join([rest, *words[1:]]) if rest else ""
    return found


def wanted_client(target: Target[SshSpec], state: SshState, peers: Peers) -> list[str]:
    """The client's settings: every node's port, and for root on the head the cluster key.

    Only root is told which user and key to take: other users keep their own.
    """
    lines = []
    everything: list[str] = []
    for node in target.cluster.nodes.values():
        names = names_of(target, node, state, peers)
        everything += names
        lines += [f"Host {' '.join(names)}", f"    Port {node.ssh.port}"]
    lines += [f"Match localuser root originalhost {','.join(everything)}", "    User root"]
    if target.is_head:
        lines += [f"    IdentityFile {state.key_path}", "    IdentitiesOnly yes"]
    return lines


def wanted_server(target: Target[SshSpec]) -> list[str]:
    """sshd's settings where it would refuse root's key; they open nothing but the way from the head."""
    return [
        f"Match Address {target.cluster.head.address}",
        "    PermitRootLogin prohibit-password",
        "    PubkeyAuthentication yes",
    ]


def whole(lines: list[str]) -> str:
    """The text of a file that is ours alone."""
    return "".join(f"{line}\n" for line in [HEADER, *lines])


def includes(text: str, directory: str) -> bool:
    """The main configuration reads the files of its directory."""
    return re.search(rf"(?im)^\s*include[\s=].*\b{re.escape(directory)}/\*", text) is not None


def cluster_key(target: Target[SshSpec], state: SshState, peers: Peers) -> PublicKey | None:
    """The head's public key; None while it has none or the head cannot be read."""
    if target.is_head:
        return state.key
    head = peers.get(target.cluster.head.name)
    return head.key if head is not None else None


def authorized_line(cluster: str, key: PublicKey) -> str:
    """One line of authorized_keys. No ``from=``: behind NAT or a second network it would shut the head out."""
    return f"restrict,pty {key.type} {key.blob} lockstep-{cluster}"


def settings_in_force(text: str, target: Target[SshSpec]) -> Iterator[tuple[int, str, str]]:
    """(line number from 1, keyword in lower case, value) of each setting that can apply to a node of the cluster."""
    hosts = [name for node in target.cluster.nodes.values() for name in (node.name, node.address)]
    applies = True
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r"\s*([A-Za-z]+)(?:\s*=\s*|\s+)(.*)$", line)
        if found is None:
            continue
        word, value = found[1].lower(), found[2].strip().strip('"')
        if word == "host":
            applies = any(_matches(host, value.split()) for host in hosts)
        elif word == "match":
            patterns = re.search(r"(?i)\b(?:original)?host\s+(\S+)", value)
            applies = patterns is None or any(
                _matches(host, patterns[1].split(",")) for host in hosts
            )
        elif applies:
            yield number, word, value


def _matches(host: str, patterns: list[str]) -> bool:
    plain = [pattern for pattern in patterns if not pattern.startswith("!")]
    negated = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return any(fnmatchcase(host, one) for one in plain) and not any(
        fnmatchcase(host, one) for one in negated
    )


def unchecked(target: Target[SshSpec], state: SshState) -> Mapping[str, list[int]]:
    """Path to the lines that switch host key checking off towards a node of the cluster."""
    found = {}
    for path, text in state.files.items():
        if not path.startswith((CLIENT_CONFIG, f"{state.home}/.ssh/config")):
            continue
        lines = [
            number
            for number, word, value in settings_in_force(text, target)
            if word == "stricthostkeychecking" and value.lower() in ("no", "off")
        ]
        if lines:
            found[path] = lines
    return found


def loose_paths(state: SshState) -> Mapping[str, str]:
    """Path to its right mode, for what sshd's StrictModes rejects."""
    if (state.server or {}).get("strictmodes") == "no":
        return {}
    directory = state.authorized.rpartition("/")[0]
    right = {
        state.home: "go-w",
        directory: "go-w",
        f"{state.home}/.ssh": "0700",
        state.authorized: "0600",
    }
    return {
        path: mode
        for path, mode in right.items()
        if path in state.modes and state.modes[path].open_to(0o022)
    }


def drift(target: Target[SshSpec], state: SshState, peers: Peers) -> list[Finding]:
    """Findings about the cluster key, who may enter, whom root trusts, and sshd itself."""
    return [
        *_key(target, state),
        *_authorized(target, state, peers),
        *_server(target, state),
        *_known(target, state, peers),
        *_client(target, state, peers),
    ]


def _key(target: Target[SshSpec], state: SshState) -> Iterator[Finding]:
    mode = state.modes.get(state.key_path)
    if not target.is_head:
        if mode is not None:
            yield Finding(
                "ssh-key-stray",
                f"the cluster's private key on {target.cluster.head.name} alone",
                f"{state.key_path} on this node",
                "the file is removed",
            )
        return
    if not state.client:
        yield Finding(
            "ssh-client-missing",
            "ssh and ssh-keygen on the head",
            "not installed",
            "install openssh-client (RPM: openssh-clients) on this node",
            repairable=False,
        )
        return
    public = state.text(f"{state.key_path}.pub").split()[:2]
    shut = mode is None or not mode.open_to(0o077)
    if mode is not None and not shut:
        yield Finding(
            "ssh-key-modes",
            "a private key that root alone can read",
            f"mode {mode.bits:04o}, owner {mode.owner}",
            "it is made root's, mode 0600",
        )
    if state.key is None and shut:
        seen = "none" if mode is None else f"{state.key_path} cannot be read as a key"
        yield Finding("ssh-cluster-key", "a key pair of the cluster", seen, "one is made")
    elif not public or (state.key and public != [state.key.type, state.key.blob]):
        yield Finding(
            "ssh-cluster-key",
            "a public key file that belongs to the private one",
            "another" if public else "none",
            "it is written from the private one",
        )


def _authorized(target: Target[SshSpec], state: SshState, peers: Peers) -> Iterator[Finding]:
    key = cluster_key(target, state, peers)
    if state.authorized == "none":
        if state.server:
            yield Finding(
                "ssh-authorized",
                "sshd reads an authorized_keys file",
                "AuthorizedKeysFile none",
                f"set AuthorizedKeysFile in {SERVER_CONFIG} on this node",
                repairable=False,
            )
        return
    lines = block_lines(state.text(state.authorized), BLOCK)
    # A head without a key makes one first; one that cannot be read leaves things as they are.
    comes = key is None and not lines and target.cluster.head.name in peers
    if comes or (key is not None and lines != [authorized_line(target.cluster.name, key)]):
        yield Finding(
            "ssh-authorized",
            "the cluster key may enter as root",
            "another key in its place" if lines else "not in authorized_keys",
            "its line in authorized_keys is written",
        )
    for path, right in loose_paths(state).items():
        mode = state.modes[path]
        yield Finding(
            "ssh-modes",
            f"{path} that only root may change",
            f"mode {mode.bits:04o}, owner {mode.owner}, which sshd refuses",
            f"it is made root's, mode {right}",
        )
    if state.mislabelled:
        yield Finding(
            "ssh-selinux",
            "root's ssh files in the context that SELinux's policy gives them",
            f"another one on {', '.join(state.mislabelled)}",
            "restorecon gives it back",
        )


def _server(target: Target[SshSpec], state: SshState) -> Iterator[Finding]:
    if state.server is None:
        yield Finding(
            "sshd-missing",
            "an sshd, so that the head can start ranks here",
            "none",
            "install openssh-server on this node",
            repairable=False,
        )
        return
    ours = server_lines(state)
    if ours is not None and ours != wanted_server(target):
        yield Finding(
            "ssh-root-login",
            "root enters from the head, by key alone",
            "an older rule of Lockstep",
            "the rule is written anew",
        )
    if state.refusal:
        yield Finding(
            "sshd-config",
            "a configuration that sshd accepts",
            state.refusal[:200],
            "mend it before sshd is started again, or nobody can log in ('sshd -t' must be silent)",
            repairable=False,
        )
        return
    for reason in shut_for_user(state.server):
        yield Finding(
            "ssh-root-login",
            "root enters from the head, by key alone",
            reason,
            f"let root in there ({SERVER_CONFIG} on this node): launchers log in as root",
            repairable=False,
        )
    login = state.server.get("permitrootlogin", "yes")
    by_key = state.server.get("pubkeyauthentication", "yes")
    if login in ("no", "forced-commands-only") or by_key == "no":
        yield Finding(
            "ssh-root-login",
            "root enters from the head, by key alone",
            f"PermitRootLogin {login}, PubkeyAuthentication {by_key}",
            f"a rule for {target.cluster.head.address} alone is added; sshd reads it again",
        )


def server_lines(state: SshState) -> list[str] | None:
    """Our rule in sshd's configuration as it is, or None where there is none."""
    if includes(state.text(SERVER_CONFIG), "sshd_config.d"):
        lines = state.text(SERVER_FILE).splitlines()
        return (lines[1:] if lines[:1] == [HEADER] else lines) or None
    return block_lines(state.text(SERVER_CONFIG), BLOCK)


def shut_for_user(settings: Mapping[str, str]) -> Iterator[str]:
    """Why sshd turns root away in ways that only the node's owner may change."""
    for word, shown in (("allowusers", "AllowUsers"), ("allowgroups", "AllowGroups")):
        allowed = settings.get(word, "").split()
        if allowed and not any(fnmatchcase("root", one.split("@")[0]) for one in allowed):
            yield f"{shown} {' '.join(allowed)}"
    for word, shown in (("denyusers", "DenyUsers"), ("denygroups", "DenyGroups")):
        denied = [one for one in settings.get(word, "").split() if "@" not in one]
        if any(fnmatchcase("root", one) for one in denied):
            yield f"{shown} {' '.join(denied)}"
    methods = settings.get("authenticationmethods", "any").split()
    if methods != ["any"] and "publickey" not in methods:
        yield f"AuthenticationMethods {' '.join(methods)}"


def _known(target: Target[SshSpec], state: SshState, peers: Peers) -> Iterator[Finding]:
    lines = wanted_known_hosts(target, state, peers)
    present = block_lines(state.text(KNOWN_HOSTS), BLOCK)
    if (present or []) != lines:
        missing = [line for line in lines if line not in (present or [])]
        left = [line for line in present or [] if line not in lines]
        yield Finding(
            "ssh-known-hosts",
            f"{len(lines)} host keys in {KNOWN_HOSTS}",
            f"{len(missing)} missing, {len(left)} too many" if present else "none",
            "the block there is written",
        )
    for path, stale in stale_lines(target, state, peers).items():
        names = sorted({line.split()[0] for line in stale})
        yield Finding(
            "ssh-hostkey",
            "every node known by its own host keys alone",
            f"another key for {', '.join(names)[:200]} in {path}",
            "the name is taken out of that line",
        )
    mine = set(state.host_keys)
    twins = [
        node.name
        for node in target.others
        if node.name in peers and mine.intersection(peers[node.name].host_keys)
    ]
    if twins:
        yield Finding(
            "ssh-cloned-hostkey",
            "host keys of its own",
            f"the same as {', '.join(twins)}",
            "on all but one of them run 'rm /etc/ssh/ssh_host_*_key* && ssh-keygen -A' and restart sshd, "
            f"then 'lockstep trust {target.node.name}'",
            repairable=False,
        )


def client_lines(state: SshState) -> list[str] | None:
    """Our settings of the client as they are, or None where there are none."""
    if includes(state.text(CLIENT_CONFIG), "ssh_config.d"):
        lines = state.text(CLIENT_FILE).splitlines()
        return lines[1:] if lines[:1] == [HEADER] else None
    return block_lines(state.text(CLIENT_CONFIG), BLOCK)


def _client(target: Target[SshSpec], state: SshState, peers: Peers) -> Iterator[Finding]:
    present = client_lines(state)
    if present != wanted_client(target, state, peers):
        yield Finding(
            "ssh-config",
            "every node's port, user and key for ssh",
            "none" if present is None else "others",
            "they are written",
        )
    for path, numbers in unchecked(target, state).items():
        yield Finding(
            "ssh-host-check-off",
            "host keys are checked towards every node",
            f"StrictHostKeyChecking off in {path}, line {', '.join(map(str, numbers))}",
            "the line is commented out; the known keys make it needless",
        )
