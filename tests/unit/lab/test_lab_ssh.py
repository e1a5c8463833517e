"""Host keys are pinned as they were made, and secrets stay in files of their own."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from deploy.lab import ssh
from deploy.lab.state import Paths


def test_new_nodes_are_pinned_and_vanished_ones_dropped() -> None:
    text = "10.77.0.11 ssh-ed25519 OLD\n10.77.0.12 ssh-ed25519 TWO\n10.77.0.13 ssh-ed25519 GONE\n"
    merged = ssh.merge_known_hosts(
        text, {"10.77.0.11": "ssh-ed25519 NEW root@node1\n"}, ["10.77.0.11", "10.77.0.12"]
    )
    assert merged == "10.77.0.12 ssh-ed25519 TWO\n10.77.0.11 ssh-ed25519 NEW\n"


def test_a_key_that_was_accepted_since_is_kept() -> None:
    text = "10.77.0.11 ssh-ed25519 ACCEPTED\n"
    assert ssh.merge_known_hosts(text, {}, ["10.77.0.11"]) == text


def test_a_login_never_asks_and_never_trusts_an_unknown_key() -> None:
    argv = ssh.login(Paths(Path("/srv/lab"), Path("/srv/lab/cache")), "ops", "10.77.0.12")
    assert argv[-1] == "ops@10.77.0.12"
    for option in (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "UserKnownHostsFile=/srv/lab/ssh/known_hosts",
    ):
        assert option in argv


def test_a_password_is_random_private_and_kept(tmp_path: Path) -> None:
    one = ssh.ensure_password(tmp_path / "node2.password")
    assert (tmp_path / "node2.password").stat().st_mode & 0o777 == 0o600
    assert ssh.ensure_password(tmp_path / "node2.password") == one
    assert ssh.ensure_password(tmp_path / "other.password") != one


def test_a_password_reaches_openssl_on_standard_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def run(argv: list[str], *, text: str) -> str:
        seen.update(argv=argv, text=text)
        return "$6$hash\n"

    monkeypatch.setattr(ssh, "run", run)
    assert ssh.password_hash("s3cret") == "$6$hash"
    assert seen["text"] == "s3cret\n"
    assert "s3cret" not in str(seen["argv"])


def test_a_wait_that_ends_says_what_it_met(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ssh, "greets", lambda address, port: False)
    with pytest.raises(TimeoutError, match="no SSH server answers"):
        ssh.wait_for_login(Paths(tmp_path, tmp_path), "root", "192.0.2.1", 0.01, lambda: [22, 80])


def test_a_login_waits_for_the_sshd_where_it_listens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ssh, "greets", lambda address, port: port == 2222)
    monkeypatch.setattr(
        ssh, "login", lambda paths, user, address, port: ["sh", "-c", f"echo {port} on", "x"]
    )
    there = ssh.wait_for_login(
        Paths(tmp_path, tmp_path), "root", "192.0.2.1", 5, lambda: [80, 2222]
    )
    assert there == ("2222", "on")


def test_only_what_speaks_ssh_is_an_sshd() -> None:
    for said, is_one in ((b"SSH-2.0-OpenSSH_9.2\r\n", True), (b"220 mail\r\n", False)):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]

            def answer(server: socket.socket = server, said: bytes = said) -> None:
                server.accept()[0].sendall(said)

            thread = threading.Thread(target=answer)
            thread.start()
            assert ssh.greets("127.0.0.1", port) is is_one
            thread.join()
        assert not ssh.greets("127.0.0.1", port)


def test_listening_ports_are_read_with_that_of_sshd_first(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue\n"
    (tmp_path / "tcp").write_text(
        f"{head}   0: 00000000:0019 00000000:0000 0A 0\n   1: 0100007F:0016 00000000:0000 0A 0\n"
        "   2: 0B004D0A:01BB 0A004D0A:C000 01 0\n"
    )
    assert ssh.listening(tmp_path) == [22, 25]
    zeros = "0" * 32
    (tmp_path / "tcp6").write_text(f"{head}   0: {zeros}:08AE {zeros}:0000 0A 0\n")
    assert ssh.listening(tmp_path) == [22, 25, 2222]
    assert ssh.listening(tmp_path / "gone") == []
