"""One node's shell as root, through pyinfra's connection: used by the look, the steps and the launch.

Why not pyinfra's ``_sudo``: with a password it uploads a helper first (one more command per node and
run) and puts the password on a command line. Here sudo reads it from standard input.
"""

from __future__ import annotations

import logging
import shlex
import socket
import subprocess
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from paramiko import Channel, SSHException
from pyinfra import logger
from pyinfra.api.command import StringCommand
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.host import Host

# paramiko logs what it also raises, with a traceback (a peer that accepts and says nothing), and
# Python prints the errors of a logger that has no handler.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


MARK = "# lockstep: what follows is run"
READ = f"lockstep=$(sed -n '/^{MARK}$/,$p'); exec </dev/null; eval \"$lockstep\""
"""Shell that runs the script that comes by standard input, from its mark on.

What is an argument is seen by every user of the node in ``ps``, and a file that a step writes may hold a token.
"""

DEAD_SECONDS = 60
"""A connection whose other side acknowledges nothing for so long is over; a switch may need 30 to let a link up."""

CHUNK = 1 << 18
"""Bytes that are handed on at a time."""


class NodeFailed(Exception):
    """A command could not be run, or ended with an error; the message is one sentence."""


class Told(NodeFailed):
    """As NodeFailed; the message was printed already, with the rest of what the command said."""


@dataclass(frozen=True)
class Output:
    """What a command left: standard output and standard error, without their last newline."""

    stdout: str
    stderr: str


@dataclass(frozen=True)
class Login:
    """How a script is run by the user who logs in: as that user, or as root by sudo."""

    sudo: bool = False
    password: str | None = None

    def running(self, script: str) -> tuple[str, str]:
        """The command for the login, and what is sent to its standard input."""
        sent = f"{MARK}\n{script}"
        if not self.sudo:
            return READ, sent
        told = (
            "{ status=$?; cat >/dev/null; exit $status; }"  # an answer comes only when all is read
        )
        if self.password is None:
            return f"sudo -H -n sh -c {shlex.quote(READ)} || {told}", sent
        # The password is tried alone: after a wrong one sudo would take the script's lines for others.
        say = "printf '%s\\n' \"$password\""
        return (
            f"IFS= read -r password; {say} | sudo -S -p '' true || {told}; "
            f"{{ {say}; cat; }} | sudo -H -S -p '' sh -c {shlex.quote(READ)}"
        ), f"{self.password}\n{sent}"


def connect(node: Host) -> None:
    """Open the connection if there is none (a node outside ``--limit`` has none).

    Raises NodeFailed when the node cannot be reached.
    """
    if node.connected:
        _watch(node)
        return
    try:
        node.connect(reason="to look", show_errors=False, raise_exceptions=True)
        _watch(node)
    except (PyinfraError, OSError, EOFError, SSHException) as error:
        if "Host key for" in str(error):
            sentence = (
                f"shows another host key than the pinned one: see 'lockstep trust {node.name}'"
            )
            raise NodeFailed(sentence) from None
        raise NodeFailed(f"cannot connect: {error}".rstrip(": ")) from None


def _watch(node: Host) -> None:
    """Let the kernel end the connection when the node dies without a word.

    paramiko waits an hour for a silent node to open a channel, and for ever for its other answers.
    """
    client = getattr(node.connector, "client", None)
    transport = client.get_transport() if client is not None else None
    while transport is not None and isinstance(transport.sock, Channel):  # through another host
        transport = transport.sock.get_transport()
    if transport is not None and transport.is_active() and hasattr(transport.sock, "setsockopt"):
        options = (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_SECONDS // 2),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_SECONDS // 6),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_SECONDS),
        )
        for option in options:
            transport.sock.setsockopt(*option)


def new_login(node: Host) -> None:
    """Close the connection and log in again."""
    client = getattr(node.connector, "client", None)
    if client is None:  # the control machine itself has no login to renew
        return
    node.connector.disconnect()
    client.close()
    node.connected = False
    connect(node)


def run(node: Host, script: str, seconds: int, show: bool = False, root: bool = True) -> Output:
    """Run a script as root with ``sh``, or as the login user; its standard input is empty.

    seconds: after these the command counts as failed. show: print its lines as they arrive.
    Raises NodeFailed with the last line of standard error, or with what broke the connection.
    """
    command, sent = (_login(node) if root else Login()).running(script)
    try:
        connect(node)
        ok, output = node.run_shell_command(
            StringCommand(command),
            print_output=show,
            print_input=False,
            _timeout=seconds,
            _sudo=False,
            _stdin=sent,
        )
    except TimeoutError:
        raise NodeFailed(f"no answer within {seconds} s") from None
    except (OSError, EOFError, SSHException) as error:
        raise NodeFailed(f"the connection broke: {str(error) or type(error).__name__}") from None
    result = Output("\n".join(output.stdout_lines), "\n".join(output.stderr_lines))
    if not ok:
        told = show and output.stderr_lines
        raise (Told if told else NodeFailed)(_reason(output.stderr_lines))
    return result


def stream(node: Host, script: str, seconds: int) -> Iterator[bytes]:
    """What a script prints that root runs with ``sh``, byte for byte as it comes.

    seconds: a node that is silent for so long is dead. Raises NodeFailed as ``run`` does.
    """
    command, sent = _login(node).running(script)
    try:
        connect(node)
        client = getattr(node.connector, "client", None)
        if client is None:  # the control machine itself
            status, said = yield from _here(command, sent.encode())
        else:
            with client.get_transport().open_session(timeout=seconds) as channel:
                channel.settimeout(seconds)
                channel.exec_command(f"sh -c {shlex.quote(command)}")
                channel.sendall(sent.encode())
                channel.shutdown_write()
                while chunk := channel.recv(CHUNK):
                    yield chunk
                said = channel.makefile_stderr("rb").read()
                status = channel.recv_exit_status()
    except TimeoutError:
        raise NodeFailed("the node is silent") from None
    except (OSError, EOFError, SSHException) as error:
        raise NodeFailed(f"the connection broke: {str(error) or type(error).__name__}") from None
    if status:
        raise NodeFailed(_reason(said.decode(errors="replace").splitlines()))


def _here(command: str, sent: bytes) -> Generator[bytes, None, tuple[int, bytes]]:
    """``stream`` on this machine; its exit status, and standard error."""
    pipe = subprocess.PIPE
    with subprocess.Popen(("sh", "-c", command), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(sent)
        process.stdin.close()
        while chunk := process.stdout.read(CHUNK):
            yield chunk
        said = process.stderr.read()
    return process.returncode, said


def _login(node: Host) -> Login:
    return Login(bool(node.data.get("_sudo")), node.data.get("_sudo_password"))


def _reason(stderr: Iterable[str]) -> str:
    """The last line of standard error."""
    lines = [line for line in stderr if line.strip()]
    return lines[-1].strip() if lines else "it failed without a word, or the connection was lost"


def say(node: Host, line: str, colour: str | None = None) -> None:
    """One line for the user, with the node's name before it (on standard error)."""
    if colour:
        node.log_styled(line, fg=colour, log_func=logger.error if colour == "red" else logger.info)
    else:
        node.log(line)
