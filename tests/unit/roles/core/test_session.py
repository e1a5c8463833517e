"""One node's shell: what it cannot do is one sentence."""

from __future__ import annotations

import socket
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
