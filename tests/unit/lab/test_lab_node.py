"""A node differs from the image by its identity, its logins and its address, and is started as measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.lab import container, kinds, ssh
from deploy.lab import node as nodes
from deploy.lab.container import Container
from deploy.lab.files import partial_beside
from deploy.lab.processes import Process
from deploy.lab.state import SYSTEMS, Paths, Record

BASE_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\n",
    "etc/shadow": "root:*:19700:0:99999:7:::\n",
    "etc/group": "root:x:0:\nsudo:x:27:\n",
    "etc/gshadow": "root:*::\nsudo:*::\n",
}


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Who every created file belongs to; the tests run without root."""
    found: dict[str, int] = {}
    monkeypatch.setattr(os, "chown", lambda path, user, group: found.update({str(path): user}))
    return found


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owners: dict[str, int]) -> Paths:
    root = tmp_path / "cache/base-1/root"
    for name, text in BASE_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "etc/shadow").chmod(0o640)
    (root / "root").mkdir(mode=0o700)
    (root / "home").mkdir()

    def make_key(path: Path, comment: str) -> str:
        path.write_text(f"private {comment}\n")
        path.with_name(f"{path.name}.pub").write_text(f"ssh-ed25519 AAAA {comment}\n")
        return f"ssh-ed25519 AAAA {comment}"

    monkeypatch.setattr(ssh, "make_key", make_key)
    monkeypatch.setattr(ssh, "password_hash", lambda password: f"$6${len(password)}")
    return Paths(tmp_path / "lab", tmp_path / "cache")


def made(paths: Paths, number: int, os: str = "debian") -> Container:
    node = Container(paths, Record(7, os=os), number, "base-1")
    nodes.create(node)
    return node


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_node_has_its_own_name_address_and_keys(paths: Paths) -> None:
    one, three = made(paths, 1), made(paths, 3)
    assert (one.upper / "etc/hostname").read_text() == "node1\n"
    assert "127.0.1.1\tnode1\n" in (one.upper / "etc/hosts").read_text()
    network = (three.upper / "etc/systemd/network/10-host0.network").read_text()
    assert "Address=10.77.7.13/24" in network
    identities = {(node.upper / "etc/machine-id").read_text() for node in (one, three)}
    assert len(identities) == 2
    assert one.host_key() == "ssh-ed25519 AAAA root@node1\n"
    assert mode(one.upper / "etc/ssh/ssh_host_ed25519_key") == 0o600
    assert not list(one.directory.glob("ssh_host*"))


def test_root_enters_by_key_alone(paths: Paths) -> None:
    node = made(paths, 1)
    assert node.entry().user == "root"
    assert node.entry().password_file is None
    assert mode(node.upper / "root/.ssh") == 0o700
    assert mode(node.upper / "root/.ssh/authorized_keys") == 0o600
    assert not (node.upper / "etc/shadow").exists()


def test_node2_is_entered_as_a_sudo_user_with_a_password_and_not_as_root(
    paths: Paths, owners: dict[str, int]
) -> None:
    node = made(paths, 2)
    upper = node.upper
    assert node.entry().user == "ops"
    assert node.entry().password_file == paths.ssh / "node2.password"
    assert mode(paths.ssh / "node2.password") == 0o600
    assert mode(paths.ssh) == 0o700
    assert (upper / "etc/passwd").read_text().endswith("ops:x:1000:1000::/home/ops:/bin/bash\n")
    assert "ops:$6$" in (upper / "etc/shadow").read_text()
    assert mode(upper / "etc/shadow") == 0o640
    assert (upper / "etc/group").read_text() == "root:x:0:\nsudo:x:27:ops\nops:x:1000:\n"
    assert (upper / "etc/gshadow").read_text() == "root:*::\nsudo:*::ops\nops:!::\n"
    assert "PermitRootLogin no" in (upper / "etc/ssh/sshd_config.d/20-lab-root.conf").read_text()
    assert not (upper / "root/.ssh").exists()
    for name in ("home/ops", "home/ops/.ssh", "home/ops/.ssh/authorized_keys"):
        assert [user for path, user in owners.items() if path.endswith(name)] == [1000]


def test_an_rpm_node_s_sudo_user_is_in_wheel_and_reads_the_system_s_bashrc(paths: Paths) -> None:
    root = paths.cache / "base-1/root"
    (root / "etc/group").write_text("root:x:0:\nwheel:x:990:\n")
    (root / "etc/gshadow").write_text("root:*::\nwheel:*::\n")
    upper = made(paths, 2, "mixed").upper
    assert (upper / "etc/group").read_text() == "root:x:0:\nwheel:x:990:ops\nops:x:1000:\n"
    assert ". /etc/bashrc" in (upper / "home/ops/.bashrc").read_text()
    assert "127.0.1.1" not in (upper / "etc/hosts").read_text()


def test_the_families_of_a_mixed_lab_s_nodes_take_turns(paths: Paths) -> None:
    families = {os: [Record(7, os=os).family(n) for n in (1, 2, 3)] for os in SYSTEMS}
    assert families == {
        "debian": ["debian", "debian", "debian"],
        "rpm": ["rpm", "rpm", "rpm"],
        "mixed": ["debian", "rpm", "debian"],
        "mixed-rpm": ["rpm", "debian", "rpm"],
    }


def test_no_file_of_the_node_holds_the_password_itself(paths: Paths) -> None:
    node = made(paths, 2)
    password = (paths.ssh / "node2.password").read_text().strip()
    files = [path for path in node.directory.rglob("*") if path.is_file()]
    assert len(password) >= 20
    assert not [path for path in files if password in path.read_text()]


def test_directories_keep_the_mode_that_the_image_gives_them(paths: Paths) -> None:
    assert mode(made(paths, 1).upper / "root") == 0o700


def test_a_member_joins_a_group_that_has_others() -> None:
    assert (
        nodes.with_member("sudo:x:27:eve\nadm:x:4:\n", "sudo", "ops")
        == "sudo:x:27:eve,ops\nadm:x:4:\n"
    )


def test_a_half_made_node_is_no_node(paths: Paths) -> None:
    made(paths, 1)
    made(paths, 3)
    partial_beside(paths.nodes / "node2").mkdir()
    (paths.nodes / "node4").mkdir()
    assert [node.name for node in kinds.existing(paths, Record(7))] == ["node1", "node3"]


def test_a_node_that_could_not_be_made_leaves_nothing(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "hosts_file", lambda name, family: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(paths, 1)
    assert list(paths.nodes.iterdir()) == []


def test_nspawn_is_told_to_keep_its_hands_off_the_host(paths: Paths) -> None:
    argv = container.nspawn_argv(
        Container(paths, Record(7), 1, "base-1"), systemd_host=False, version=252
    )
    assert argv[0] == "systemd-nspawn"
    assert "--drop-capability=CAP_SYS_TIME,CAP_SYS_MODULE" in argv
    assert "--network-bridge=lockstep7" in argv
    assert f"--bind-ro={paths.repository}:/srv/lockstep/packages" in argv
    assert f"--bind={paths.shared}:/shared" in argv
    assert "--machine=ls7-node1" in argv
    assert "--hostname=node1" in argv


@pytest.mark.parametrize(
    ("systemd_host", "version", "keep_unit", "no_sync"),
    [(False, 252, True, True), (True, 252, False, True), (False, 249, True, False)],
)
def test_nspawn_s_arguments_follow_the_host(
    paths: Paths, systemd_host: bool, version: int, keep_unit: bool, no_sync: bool
) -> None:
    node = Container(paths, Record(7), 1, "base-1")
    settings = container.run_settings(node, systemd_host=systemd_host, version=version)
    assert ("--keep-unit" in settings["argv"]) is keep_unit
    assert ("--suppress-sync=yes" in settings["argv"]) is no_sync
    assert settings["cgroup"] == (None if systemd_host else "ls7-node1")
    assert settings["environment"] == {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}
    assert settings["link"] == "vb-ls7-node1"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("systemd 252 (252.39-1~deb12u2)\n+PAM", 252),
        ("systemd 255 (255.4)", 255),
        ("", 0),
        ("systemd x", 0),
    ],
)
def test_the_version_is_read(text: str, version: int) -> None:
    assert container.nspawn_version(text) == version


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "boot\nlockstep lab: cannot mount the node's root: bad option\nmore\n",
            "cannot mount the node's root: bad option",
        ),
        (
            "Failed to add new veth interfaces: File exists\nbye\n",
            "Failed to add new veth interfaces: File exists",
        ),
        (
            "qemu-system-x86_64: -netdev tap: could not configure it\nlockstep lab: the machine is off\n",
            "qemu-system-x86_64: -netdev tap: could not configure it",
        ),
        ("one\n\ntwo\n", "two"),
        ("", "it said nothing"),
    ],
)
def test_why_a_node_went_off_is_taken_from_its_console(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "console.log").write_text(log)
    assert nodes.last_words(tmp_path / "console.log") == said


def test_a_shell_in_a_node_takes_nothing_of_the_caller_along() -> None:
    argv = container.shell_argv(Process(4242, 1, "b"), ["sh", "-c", "echo $x"])
    assert argv[:4] == ["nsenter", "--target", "4242", "--all"]
    assert argv[argv.index("env") + 1] == "-i"
    assert argv[-3:] == ["sh", "-c", "echo $x"]
    assert container.shell_argv(Process(4242, 1, "b"), [])[-2:] == ["/bin/bash", "--login"]


def test_a_node_without_records_is_off(paths: Paths) -> None:
    node = made(paths, 1)
    assert not node.is_on()
    (node.directory / "supervisor.json").write_text('{"pid": 4194000, "start": 1, "boot": "x"}')
    assert not node.is_on()
    assert node.init() is None
