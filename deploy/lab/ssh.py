"""Keys, pinned host keys and logins of the lab: who may enter which node, and when a node answers."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from deploy.lab.commands import environment, run
from deploy.lab.files import make_directory, write_whole
from deploy.lab.state import Paths

PORT = 22
LISTENING = "0A"
"""The state of a socket in /proc/net/tcp that accepts connections."""


def make_key(path: Path, comment: str) -> str:
    """An ed25519 key pair at ``path`` (0600) unless it is there; returns the public key's line."""
    public = path.with_name(f"{path.name}.pub")
    if not (path.is_file() and public.is_file()):
        for stale in (path, public):
            stale.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])
    path.chmod(0o600)
    return public.read_text().strip()


def ensure_control_key(paths: Paths) -> str:
    """The key that enters every node; returns its public line."""
    make_directory(paths.ssh, 0o700)
    return make_key(paths.key, "lockstep lab")


def ensure_password(path: Path) -> str:
    """A random password in a file of mode 0600, kept when there is one."""
    if path.is_file() and (found := path.read_text().strip()):
        path.chmod(0o600)
        return found
    password = secrets.token_urlsafe(18)
    write_whole(path, f"{password}\n", 0o600)
    return password


def password_hash(password: str) -> str:
    """The password as /etc/shadow holds it; it reaches openssl on standard input, never in argv."""
    return run(["openssl", "passwd", "-6", "-stdin"], text=f"{password}\n").strip()


def merge_known_hosts(text: str, new: Mapping[str, str], live: Iterable[str]) -> str:
    """known_hosts with the new nodes' keys (address → public key line) and nothing of vanished ones.

    A line of a node that is not new stays as it is: its key may have been changed and accepted since.
    """
    keep = set(live) - set(new)
    lines = [line for line in text.splitlines() if line.split(" ", 1)[0] in keep]
    lines += [f"{address} {' '.join(key.split()[:2])}" for address, key in new.items()]
    return "".join(f"{line}\n" for line in lines)


def login(paths: Paths, user: str, address: str, port: int = PORT) -> list[str]:
    """ssh argv that enters a node without ever asking. Its pinned key counts on every port."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "15",
        "IdentitiesOnly": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(paths.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": address,
        "LogLevel": "ERROR",
    }
    argv = ["ssh", "-F", "/dev/null", "-i", str(paths.key), "-p", str(port)]
    for name, value in options.items():
        argv += ["-o", f"{name}={value}"]
    return [*argv, f"{user}@{address}"]


def listening(net: Path) -> list[int]:
    """Ports on which something accepts connections, the usual one of sshd first. net: /proc/PID/net."""
    tables = ""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # the node goes or comes
            tables += (net / name).read_text()
    return ports_of(tables)


def ports_of(tables: str) -> list[int]:
    """The same from the text of /proc/net/tcp and tcp6."""
    lines = (line.split() for line in tables.splitlines())
    found = {
        int(fields[1].rpartition(":")[2], 16)
        for fields in lines
        if len(fields) > 3 and fields[3] == LISTENING
    }
    return sorted(found, key=lambda port: (port != PORT, port))


def greets(address: str, port: int, seconds: float = 2.0) -> bool:
    """Whether an SSH server answers there: it speaks first (RFC 4253, section 4.2)."""
    try:
        with socket.create_connection((address, port), timeout=seconds) as connection:
            connection.settimeout(seconds)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def wait_for_login(
    paths: Paths,
    user: str,
    address: str,
    seconds: float,
    ports: Callable[[], Sequence[int]],
    login_seconds: float = 5.0,
) -> tuple[str, str]:
    """Wait for a login; returns the boot id and what ``systemctl is-system-running`` says.

    ports: those on which the node listens now. login_seconds: how long a login that was begun may take.
    Raises TimeoutError with the last thing that ssh said.
    """
    until = time.monotonic() + seconds
    said = "no SSH server answers"
    while time.monotonic() < until:
        port = next((port for port in ports() if greets(address, port)), None)
        if port is not None:
            try:
                done = subprocess.run(
                    [
                        *login(paths, user, address, port),
                        "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running --wait",
                    ],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=max(login_seconds, until - time.monotonic()),
                    env=environment(),
                )
            except subprocess.TimeoutExpired:
                said = "ssh answered, but the node did not finish booting"
                continue
            words = done.stdout.split()
            if len(words) == 2:
                return words[0], words[1]
            said = (done.stderr.strip().splitlines() or [said])[-1]
        time.sleep(0.1)
    raise TimeoutError(said)
