"""One node's shell: what it cannot do is one sentence."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paramiko import Channel
from pyinfra.api import Config, Inventory, State
from pyinfra.api.host import Host

from roles.core import session


def host(**data: Any) -> Host:
    inventory = Inventory(([("node1", data)], {}))
    State(inventory, Config())
    return inventory.get_host("node1")


def test_a_key_that_pyinfra_cannot_read_is_a_sentence(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("no key\n")
    with pytest.raises(session.NodeFailed, match="cannot connect: .*key"):
        session.run(host(ssh_hostname="127.0.0.1", ssh_key=str(key)), "true", 5)


def test_a_command_that_fails_without_a_word_is_not_called_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = host()
    node.connected = True
    failed = (False, type("Output", (), {"stdout_lines": [], "stderr_lines": []}))
    monkeypatch.setattr(node, "run_shell_command", lambda *arguments, **more: failed)
    with pytest.raises(session.NodeFailed, match="failed without a word"):
        session.run(node, "false", 5)


@pytest.mark.parametrize("hops", [0, 1])
def test_the_kernel_ends_the_connection_of_a_node_that_dies_without_a_word(
    monkeypatch: pytest.MonkeyPatch, hops: int
) -> None:
    node = host()
    node.connected = True
    done = (True, SimpleNamespace(stdout_lines=["hello"], stderr_lines=[]))
    monkeypatch.setattr(node, "run_shell_command", lambda *arguments, **more: done)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        transport: Any = SimpleNamespace(sock=sock, is_active=lambda: True)
        if hops:  # the connection to the node lies in a channel of that to the host before it
            channel = Channel(1)
            channel.transport = transport
            transport = SimpleNamespace(sock=channel, is_active=lambda: True)
        client = SimpleNamespace(get_transport=lambda: transport)
        monkeypatch.setattr(node, "connector", SimpleNamespace(client=client))
        assert session.run(node, "echo hello", 5).stdout == "hello"
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        patience = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert patience == 1000 * session.DEAD_SECONDS


SUDO = """#!/bin/sh
# As sudo: -n fails where a password is needed, -S reads one from standard input, three times at most.
here=$(dirname "$0"); echo "$*" >>"$here/arguments"
for word; do
  case $word in
    -n) test -e "$here/password" && { echo "sudo: a password is required" >&2; exit 1; } ;;
    -S) test -e "$here/password" || continue
      for try in 1 2 3; do
        IFS= read -r said || { echo "sudo: no password was provided" >&2; exit 1; }
        echo tried >>"$here/tries"
        test "$said" = "$(cat "$here/password")" && break
      done
      test "$said" = "$(cat "$here/password")" || exit 1 ;;
  esac
done
while :; do case $1 in -p) shift 2 ;; -*) shift ;; *) exec "$@" ;; esac; done
"""
LOGINS = [
    # What the node asks for, and what the cluster file gives: whether the script runs, and tries of a password.
    (session.Login(), None, 0, 0),
    (session.Login(sudo=True), None, 0, 0),
    (session.Login(sudo=True), "right", 1, 0),
    (session.Login(sudo=True, password="right"), "right", 0, 2),
    (session.Login(sudo=True, password="right"), None, 0, 0),
    (session.Login(sudo=True, password="wrong"), "right", 1, 1),
]


@pytest.mark.parametrize(("login", "password", "status", "tries"), LOGINS)
def test_a_script_is_in_nobody_s_arguments_and_a_wrong_password_is_tried_once(
    tmp_path: Path, login: session.Login, password: str | None, status: int, tries: int
) -> None:
    (tmp_path / "sudo").write_text(SUDO)
    (tmp_path / "sudo").chmod(0o755)
    if password:
        (tmp_path / "password").write_text(f"{password}\n")
    long = f": {'x' * 300_000}"  # longer than an argument may be
    command, sent = login.running(
        f"set -e\ncat\ntoken=very-secret\necho token=$token\n{long}\nfalse"
    )
    done = subprocess.run(
        ["sh", "-c", command],
        input=sent,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1  # the script's own last word, or sudo's
    assert (done.stdout == "token=very-secret\n") is (status == 0)
    arguments = tmp_path / "arguments"
    assert "very-secret" not in command + (arguments.read_text() if arguments.exists() else "")
    tried = tmp_path / "tries"
    assert (len(tried.read_text().splitlines()) if tried.exists() else 0) == tries
