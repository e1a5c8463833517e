"""Host keys are pinned as they were made, and secrets stay in files of their own."""

from __future__ import annotations

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
    monkeypatch.setattr(ssh, "listens", lambda address: False)
    with pytest.raises(TimeoutError, match="no answer on port 22"):
        ssh.wait_for_login(Paths(tmp_path, tmp_path), "root", "192.0.2.1", 0.01)
