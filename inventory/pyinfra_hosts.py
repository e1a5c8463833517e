"""What pyinfra must know to reach each node: its name, address, login, key and pinned host key.

Imports nothing of pyinfra: the names are those of its ssh connector's host data. Looks at files on the
control machine, never at a node.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from inventory.cluster import Cluster, Node, Sudo
from inventory.errors import FileProblem, Problem, shown

LOCAL_CONNECTOR = "lockstep-local"
"""The name under which pyinfra finds ``inventory.local_connector`` (see ``pyproject.toml``)."""

CONNECT_SECONDS = 5
BANNER_SECONDS = 10
RETRIES = 1
"""One more try lets a login survive sshd's reload; a dead node still fails in about ten seconds."""

MASK = "*MASKED*"


class Password:
    """A password that shows itself only where it is formatted into a command (``f"{password}"``).

    ``str``, ``repr``, logs and pyinfra's JSON output get a mask.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __format__(self, spec: str) -> str:
        return format(self._text, spec)

    def __str__(self) -> str:
        return MASK

    def __repr__(self) -> str:
        return repr(MASK)

    def to_json(self) -> str:
        """What pyinfra's ``--json`` prints."""
        return MASK


def hosts(cluster: Cluster) -> list[tuple[str, dict[str, Any]]]:
    """One host for each node, in the order of the file, called as the node in pyinfra's inventory.

    Makes the file of pinned host keys where it is missing: pyinfra adds to it and cannot make it.
    A first key is accepted and pinned; pyinfra refuses a node whose key is another one later.
    Raises FileProblem for a password or pin file that cannot be used.
    """
    return [(_host_name(cluster, node), _data(cluster, node)) for node in cluster.nodes.values()]


def _host_name(cluster: Cluster, node: Node) -> str:
    if not node.local:
        return node.name
    if LOCAL_CONNECTOR not in {found.name for found in entry_points(group="pyinfra.connectors")}:
        sentence = "local: true needs Lockstep installed beside pyinfra: run pip install -e ."
        raise FileProblem(Problem(shown(cluster.path), None, f"nodes.{node.name}", sentence))
    return f"@{LOCAL_CONNECTOR}/{node.name}"


def _data(cluster: Cluster, node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {"_sudo": bool(node.ssh.sudo)}
    if isinstance(node.ssh.sudo, Sudo):
        data["_sudo_password"] = _password(node.ssh.sudo.password_file)
    if node.local:
        return data
    pins = node.ssh.known_hosts or cluster.known_hosts
    _make_pins(pins)
    data |= {
        "ssh_hostname": node.address,
        "ssh_port": node.ssh.port,
        "ssh_user": node.ssh.user,
        "ssh_known_hosts_file": str(pins),
        "ssh_strict_host_key_checking": "accept-new",
        "ssh_connect_retries": RETRIES,
        "ssh_paramiko_connect_kwargs": {
            "timeout": CONNECT_SECONDS,
            "banner_timeout": BANNER_SECONDS,
        },
    }
    if node.ssh.key is not None:
        data["ssh_key"] = str(node.ssh.key)
    return data


def _password(file: Path) -> Password:
    try:
        with file.open(encoding="utf-8") as lines:
            text = lines.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        raise FileProblem(Problem(str(file), None, "", "the password cannot be read")) from None
    if not text:
        raise FileProblem(Problem(str(file), None, "", "holds no password in its first line"))
    return Password(text)


def _make_pins(file: Path) -> None:
    try:
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.touch(mode=0o600)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        sentence = f"the pinned host keys cannot be kept here: {reason}"
        raise FileProblem(Problem(str(file), None, "", sentence)) from None
