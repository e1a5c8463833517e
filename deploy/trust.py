"""``lockstep trust NODE``: accept the host key that a node shows now, in place of the pinned one.

A changed key stops every run, because it may be another machine that answers. Only a person who knows
why it changed (the node was installed anew) can say that it is right. Nothing is sent to the node.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paramiko import PKey, SSHException, Transport
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

from inventory.cluster import Cluster, Node
from roles.ssh.drift import is_name

SECONDS = 10
DONE, DECLINED, WRONG = 0, 1, 2


class TrustError(Exception):
    """The present key cannot be had, or the pin cannot be written; one sentence."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "trust",
        help="accept a node's changed host key",
        description="Show the pinned and the present host key of a node, ask, and pin the present one.",
    )
    parser.add_argument("node", metavar="NODE", help="a node's name in the cluster file")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    from roles.registry import declared

    try:
        return trust(declared(), arguments.node, arguments.yes)
    except TrustError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return WRONG


def trust(cluster: Cluster, name: str, sure: bool) -> int:
    """Pin the key that the node shows now. The exit code: 0 done or nothing to do, 1 declined.

    sure: do not ask. Raises TrustError for a node that is not declared or does not answer.
    """
    node = declared_node(cluster, name)
    if node.local:
        print(f"{name} is this machine itself: no key of it is pinned.")
        return DONE
    file = (node.ssh.known_hosts or cluster.known_hosts).expanduser()
    hostname, channel = route(node)
    entry = entry_name(hostname, node.ssh.port)
    text = _read(file)
    pinned = pinned_keys(text, entry)
    shown = present_key(node, channel, [key.get_name() for key in pinned])
    if shown in pinned:
        print(f"{name} shows the pinned key, {fingerprint(shown)}: nothing to do.")
        return DONE
    for key in pinned:
        print(f"pinned:  {fingerprint(key)}")
    print(f"present: {fingerprint(shown)}")
    print(f"Compare it on the console of {name}: ssh-keygen -l -f {_public_file(shown)}")
    if not sure and not _asked(f"Is {name} ({entry}) meant to show this key? [y/N] "):
        print(f"Nothing was changed; {name} stays refused." if pinned else "Nothing was changed.")
        return DECLINED
    _write(file, replaced(text, entry, shown))
    print(
        f"{name} is pinned with the present key in {file}; "
        "the other nodes learn it from pyinfra inventory.py deploy/cluster.py."
    )
    return DONE


def declared_node(cluster: Cluster, name: str) -> Node:
    """The node of that name. Raises TrustError that names the nearest one."""
    if name not in cluster.nodes:
        raise TrustError(cluster.no_node(name))
    return cluster.nodes[name]


def route(node: Node) -> tuple[str, Any]:
    """The name under which pyinfra pins the node, and an open connection to its sshd.

    pyinfra obeys the user's ssh configuration (HostName, ProxyJump, ProxyCommand), so this does too.
    Raises TrustError when there is no answer.
    """
    from pyinfra.connectors.sshuserclient.client import SSHClient

    port = node.ssh.port
    try:
        hostname, settings, *_ = SSHClient().parse_config(
            node.address, {"port": port, "timeout": SECONDS}, strict_host_key_checking="yes"
        )
        through = settings.get("sock")
        return hostname, through or socket.create_connection((hostname, port), timeout=SECONDS)
    except (OSError, SSHException, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise TrustError(
            f"{_place(node)} cannot be reached: {reason.lower()}; "
            "start it, or mend its address in the cluster file"
        ) from None


def _place(node: Node) -> str:
    return f"{node.name} ({node.address} port {node.ssh.port})"


def entry_name(hostname: str, port: int) -> str:
    """What a host is called in a file of pinned keys."""
    return hostname if port == 22 else f"[{hostname}]:{port}"


def fingerprint(key: PKey) -> str:
    """As ``ssh-keygen -l`` prints it: bits, SHA-256 in base64 without padding, type."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_bits()} SHA256:{digest} ({_kind(key).upper()})"


def _kind(key: PKey) -> str:
    return key.get_name().removeprefix("ssh-").split("-")[0]


def _public_file(key: PKey) -> str:
    return f"/etc/ssh/ssh_host_{_kind(key)}_key.pub"


def present_key(node: Node, connection: Any, types: Sequence[str]) -> PKey:
    """The host key that the node shows now, of the pinned type if it has one; no login happens.

    connection: a socket to its sshd; it is closed. types: key types to ask for first.
    Raises TrustError when no ssh server answers there.
    """
    try:
        transport = Transport(connection)
        try:
            offered = transport.get_security_options()
            offered.key_types = _first(types, offered.key_types)
            transport.banner_timeout = SECONDS
            transport.start_client(timeout=SECONDS)
            return transport.get_remote_server_key()
        finally:
            transport.close()
    except (SSHException, OSError, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise TrustError(f"{_place(node)} answers, but not as an ssh server: {reason}") from None
    finally:
        connection.close()


def _first(wanted: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """The offered algorithms, those of the wanted key types in front (an RSA key has several)."""
    return tuple(sorted(offered, key=lambda name: not any(_serves(name, kind) for kind in wanted)))


def _serves(algorithm: str, kind: str) -> bool:
    return algorithm == kind or (kind == "ssh-rsa" and algorithm.startswith("rsa-sha2-"))


def pinned_keys(text: str, entry: str) -> list[PKey]:
    """The keys that a file of pinned keys holds for an entry; hashed names are understood."""
    return [
        found.key
        for line in text.splitlines()
        if (found := _entry(line)) is not None and found.key is not None and _names(found, entry)
    ]


def _entry(line: str) -> HostKeyEntry | None:
    if not line.strip() or line.lstrip().startswith(("#", "@")):
        return None
    try:
        return HostKeyEntry.from_line(line.strip())
    except (InvalidHostKey, SSHException, ValueError):
        return None


def _names(found: HostKeyEntry, entry: str) -> bool:
    return any(is_name(name, entry) for name in found.hostnames or [])


def replaced(text: str, entry: str, key: PKey) -> str:
    """The file with this key as the only one of the entry; other names on its lines keep theirs."""
    lines = []
    for line in text.splitlines():
        found = _entry(line)
        if found is None or not _names(found, entry):
            lines.append(line)
            continue
        rest = [name for name in found.hostnames or [] if not is_name(name, entry)]
        if rest:
            lines.append(" ".join([",".join(rest), *line.split()[1:]]))
    lines.append(f"{entry} {key.get_name()} {key.get_base64()}")
    return "".join(f"{line}\n" for line in lines)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise TrustError(f"{file} cannot be read: {error.strerror or error}") from None


def _write(file: Path, text: str) -> None:
    """At once or not at all; a new file is readable by its owner alone."""
    try:
        file = file.resolve()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        handle, fresh = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(fresh).chmod(mode)
            Path(fresh).replace(file)
        except BaseException:
            Path(fresh).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TrustError(f"{file} cannot be written: {error.strerror or error}") from None


def _asked(question: str) -> bool:
    if not sys.stdin.isatty():
        raise TrustError("nobody is there to answer: add --yes if the present key is the right one")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D is no yes
        print()
        return False
