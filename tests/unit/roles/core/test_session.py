"""One node's shell: what it cannot do is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
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
