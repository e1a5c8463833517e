"""lockstep trust: a changed host key is shown, asked about, and pinned in place of the old one alone."""

from __future__ import annotations

import argparse
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paramiko import ECDSAKey, Ed25519Key, PKey, ServerInterface, SSHException, Transport
from paramiko.hostkeys import HostKeys

from deploy import trust
from inventory.cluster import Cluster, Node, Ssh


@dataclass
class Server:
    """An ssh server on this machine that shows the given host keys and lets nobody in."""

    port: int
    keys: list[PKey]


def made(path: Path, kind: str = "ed25519") -> PKey:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
    reader = Ed25519Key if kind == "ed25519" else ECDSAKey
    return reader.from_private_key_file(str(path))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    found = Server(listener.getsockname()[1], [made(tmp_path / "host")])

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            transport = Transport(connection)
            for key in found.keys:
                transport.add_server_key(key)
            try:
                transport.start_server(server=ServerInterface())
            except (SSHException, OSError, EOFError):
                transport.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield found
    listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the one who accepts
    listener.close()
    thread.join(10)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ssh configuration of the user takes part."""
    monkeypatch.setenv("HOME", str(tmp_path))


def cluster(tmp_path: Path, port: int) -> Cluster:
    pins = tmp_path / "pins" / "known_hosts"
    ssh = Ssh(port=port, known_hosts=pins)
    nodes = {
        "node1": Node(name="node1", address="127.0.0.1", ssh=ssh),
        "node2": Node(name="node2", address="10.0.0.2", ssh=ssh, local=True),
    }
    return Cluster("lab", Path("lab.yaml"), nodes, ssh)


def pin(target: Cluster, text: str) -> Path:
    file = target.known_hosts
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def line(port: int, key: PKey) -> str:
    return f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n"


def test_the_pinned_key_needs_nothing(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    target = cluster(tmp_path, server.port)
    file = pin(target, line(server.port, server.keys[0]))
    assert trust.trust(target, "node1", sure=False) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert file.read_text() == line(server.port, server.keys[0])


def test_a_changed_key_replaces_the_pin_and_both_fingerprints_are_shown(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    old = made(tmp_path / "old")
    target = cluster(tmp_path, server.port)
    other = f"10.0.0.9 {old.get_name()} {old.get_base64()}\n"
    file = pin(target, f"# mine\n{line(server.port, old)}{other}")
    file.chmod(0o640)
    assert trust.trust(target, "node1", sure=True) == 0
    shown = capsys.readouterr().out
    for name in ("old", "host"):
        listed = subprocess.run(
            ["ssh-keygen", "-l", "-f", str(tmp_path / f"{name}.pub")],
            capture_output=True,
            text=True,
            check=True,
        )
        bits, fingerprint, *_ = listed.stdout.split()
        assert f"{bits} {fingerprint} (ED25519)" in shown
    assert file.read_text() == f"# mine\n{other}{line(server.port, server.keys[0])}"
    assert file.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["known_hosts"]


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("yes", 0), ("", 1), ("n", 1)])
def test_only_a_yes_changes_the_pin(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    old = made(tmp_path / "old")
    target = cluster(tmp_path, server.port)
    file = pin(target, line(server.port, old))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert trust.trust(target, "node1", sure=False) == code
    assert (line(server.port, old) in file.read_text()) == bool(code)


def test_an_end_of_input_at_the_question_is_a_no(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cluster(tmp_path, server.port)
    file = pin(target, line(server.port, made(tmp_path / "old")))
    before = file.read_text()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    assert trust.trust(target, "node1", sure=False) == 1
    assert file.read_text() == before


def test_without_a_terminal_nobody_is_asked_and_nothing_changes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cluster(tmp_path, server.port)
    file = pin(target, line(server.port, made(tmp_path / "old")))
    before = file.read_text()
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(trust.TrustError, match="--yes"):
        trust.trust(target, "node1", sure=False)
    assert file.read_text() == before


def test_a_node_without_a_pin_gets_one_in_a_file_of_its_owner_alone(
    tmp_path: Path, server: Server
) -> None:
    target = cluster(tmp_path, server.port)
    assert trust.trust(target, "node1", sure=True) == 0
    assert target.known_hosts.read_text() == line(server.port, server.keys[0])
    assert target.known_hosts.stat().st_mode & 0o777 == 0o600


def test_the_key_of_the_pinned_type_is_asked_for_where_a_server_has_several(
    tmp_path: Path, server: Server
) -> None:
    server.keys.append(made(tmp_path / "ec", "ecdsa"))
    target = cluster(tmp_path, server.port)
    for key in server.keys:
        file = pin(target, line(server.port, key))
        assert trust.trust(target, "node1", sure=False) == 0
        assert file.read_text() == line(server.port, key)


def test_hashed_names_are_replaced_and_shared_lines_keep_their_other_names(tmp_path: Path) -> None:
    old, new = made(tmp_path / "old"), made(tmp_path / "new")
    words = f"{old.get_name()} {old.get_base64()}"
    hashed = HostKeys.hash_host("10.0.0.1")
    text = (
        f"{hashed} {words}\nnode1,10.0.0.1 {words} comment\n@revoked 10.0.0.1 {words}\nnot a key\n"
    )
    assert len(trust.pinned_keys(text, "10.0.0.1")) == 2
    assert trust.replaced(text, "10.0.0.1", new) == (
        f"node1 {words} comment\n@revoked 10.0.0.1 {words}\nnot a key\n10.0.0.1 {new.get_name()} {new.get_base64()}\n"
    )


def test_the_control_machine_itself_has_no_pin(tmp_path: Path) -> None:
    assert trust.trust(cluster(tmp_path, 1), "node2", sure=True) == 0
    assert not (tmp_path / "pins").exists()


def handled(monkeypatch: pytest.MonkeyPatch, target: Cluster, *words: str) -> int:
    monkeypatch.setattr("roles.registry.declared", lambda: target)
    parser = argparse.ArgumentParser()
    trust.register(parser.add_subparsers())
    arguments = parser.parse_args(["trust", *words])
    return int(arguments.handler(arguments))


def test_an_unknown_node_is_one_sentence_with_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert handled(monkeypatch, cluster(tmp_path, 1), "nod1") == 2
    assert (
        capsys.readouterr().err
        == "lockstep: lab.yaml declares no node 'nod1': did you mean node1?\n"
    )


def test_a_node_that_does_not_answer_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert handled(monkeypatch, cluster(tmp_path, port), "node1", "--yes") == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"lockstep: node1 (127.0.0.1 port {port}) cannot be reached")
        and said.count("\n") == 1
    )


def test_something_else_than_ssh_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(
            target=lambda: listener.accept()[0].sendall(b"220 mail\r\n" * 200), daemon=True
        ).start()
        assert (
            handled(monkeypatch, cluster(tmp_path, listener.getsockname()[1]), "node1", "--yes")
            == 2
        )
    said = capsys.readouterr().err
    assert "not as an ssh server" in said and said.count("\n") == 1


def test_a_pin_file_that_cannot_be_written_is_one_sentence(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pins").write_text("a file where the folder should be")
    assert handled(monkeypatch, cluster(tmp_path, server.port), "node1", "--yes") == 2
    assert capsys.readouterr().err.startswith("lockstep: ")
