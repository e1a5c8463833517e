"""A cluster file is checked whole before any node is touched; each mistake is one sentence with its line."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from pydantic import ConfigDict, Field, SecretStr, model_validator

from inventory import loader
from inventory.base import Address, Spec, Strict, Version
from inventory.cluster import Cluster, Ssh, Sudo
from inventory.errors import FileProblem, InventoryProblem, SchemaProblem, SyntaxProblem
from inventory.loader import SectionModel, default_path, load


def private_key(passphrase: bytes | None = None) -> str:
    """A new key as ssh-keygen writes it."""
    return (
        Ed25519PrivateKey.generate()
        .private_bytes(
            Encoding.PEM,
            PrivateFormat.OpenSSH,
            BestAvailableEncryption(passphrase) if passphrase else NoEncryption(),
        )
        .decode()
    )


PRIVATE_KEY = private_key()
ENCRYPTED_KEY = private_key(b"secret")
NO_KEY = "{path} is no private key that can be used: it must be an Ed25519, ECDSA or RSA key"
DAMAGED_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


class Pin(Strict):
    archive: Path
    pins: dict[str, Version] = {}
    tags: tuple[str, ...] = ()


class Boxes(Spec):
    """Names mapped to entries, by pydantic's extra fields."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Pin]


class Shelves(Spec):
    """Names mapped to entries, by a validator that reshapes the section."""

    entries: dict[str, Pin]

    @model_validator(mode="before")
    @classmethod
    def _reshape(cls, values: Any) -> Any:
        return {"entries": values}


class Limits(Spec):
    nofile: Annotated[int, Field(ge=256)] | None = 1024
    memlock: Annotated[int, Field(ge=64)] | Literal["unlimited"] = "unlimited"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    peers: list[Address] = []
    enabled: bool = True
    folder: Path | None = None
    token: SecretStr | None = None
    label: Annotated[str, Field(min_length=1)] = "x"
    hosts: Annotated[tuple[str, ...], Field(min_length=1)] = ("x",)

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        if self.nofile == 666:
            yield "nofile", f"is too few for {len(cluster.nodes)} nodes"
            yield "peers[1]", "is one too many"
        if self.label == "odd":
            yield "", "contradicts itself"


SECTIONS = {
    "limits": SectionModel(Limits, Limits()),
    "boxes": SectionModel(Boxes),
    "shelves": SectionModel(Shelves),
}

GOOD = """\
cluster: training
ssh:
  user: ops
  port: 2222
  key: keys/id
  sudo: true
nodes:
  node1:
    address: 10.0.0.1
    gpus: 8
    gpu_class: a100
    interface: bond0.100
  node2:
    address: 10.0.0.2
    ssh: {user: root, sudo: false, port: 22}
  node3:
    address: 10.0.0.3
    local: true
    ssh: {sudo: {password_file: keys/password}}
job: jobs/one.yaml
limits: {nofile: 4096, memlock: 8192}
boxes:
  manage: check
  main: {archive: main.tar, pins: {protobuf: '3.20'}, tags: [a, b]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCKSTEP_CLUSTER", raising=False)
    for name in ("keys", "jobs"):
        (tmp_path / name).mkdir()
    (tmp_path / "jobs/one.yaml").write_text("name: one\n")
    secret("keys/id", PRIVATE_KEY)
    secret("keys/password", "geheim\n")
    return tmp_path


def secret(name: str, text: str, mode: int = 0o600) -> None:
    path = Path(name)
    path.write_text(text)
    path.chmod(mode)


def read(text: str) -> Cluster:
    path = Path("c.yaml")
    path.write_text(text)
    return load(path, SECTIONS)


def wrong(text: str) -> list[str]:
    with pytest.raises(SchemaProblem) as caught:
        read(text)
    return str(caught.value).splitlines()


def nodes(*entries: str) -> str:
    """A file with these nodes, the first one in line 3."""
    return "\n".join(["cluster: lab", "nodes:", *(f"  {entry}" for entry in entries)])


# --- what a right file means -------------------------------------------------------------------


def test_nodes_keep_the_order_of_the_file_and_the_first_is_the_head() -> None:
    cluster = read(nodes("zoe: {address: 10.0.0.9}", "amy: {address: 10.0.0.1}"))
    assert list(cluster.nodes) == ["zoe", "amy"]
    assert cluster.head.name == "zoe"


def test_a_node_takes_over_the_clusters_ssh_key_by_key(folder: Path) -> None:
    found = {name: node.ssh for name, node in read(GOOD).nodes.items()}
    key = folder / "keys/id"
    assert found == {
        "node1": Ssh(user="ops", port=2222, key=key, sudo=True),
        "node2": Ssh(user="root", port=22, key=key, sudo=False),
        "node3": Ssh(
            user="ops",
            port=2222,
            key=key,
            sudo=Sudo(password_file=folder / "keys/password"),
        ),
    }


def test_a_node_may_return_to_a_default_that_the_cluster_changed() -> None:
    cluster = read(
        "cluster: a\nssh: {port: 2222}\nnodes: {b: {address: 10.0.0.1, ssh: {port: 22}}}"
    )
    assert cluster.nodes["b"].ssh.port == 22


def test_the_rest_of_a_node_is_as_the_file_says() -> None:
    node = read(GOOD).nodes["node1"]
    assert (node.name, node.address, node.gpus, node.gpu_class, node.interface, node.local) == (
        "node1",
        "10.0.0.1",
        8,
        "a100",
        "bond0.100",
        False,
    )


def test_paths_count_from_the_files_own_folder(folder: Path) -> None:
    (folder / "deep").mkdir()
    path = folder / "deep/c.yaml"
    path.write_text(
        "cluster: a\nssh: {key: ../keys/id, known_hosts: pins}\nnodes: {b: {address: 10.0.0.1}}\n"
        "job: ../jobs/one.yaml"
    )
    cluster = load(Path("deep/c.yaml"), {})
    assert cluster.path == path
    assert cluster.ssh.key == folder / "keys/id"
    assert cluster.known_hosts == folder / "deep/pins"
    assert cluster.job == folder / "jobs/one.yaml"


def test_a_job_file_is_also_found_from_the_current_directory(folder: Path) -> None:
    (folder / "deep").mkdir()
    Path("deep/c.yaml").write_text(nodes("b: {address: 10.0.0.1}") + "\njob: jobs/one.yaml")
    assert load(Path("deep/c.yaml"), {}).job == folder / "jobs/one.yaml"


def test_a_tilde_is_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    cluster = read(nodes("b: {address: 10.0.0.1, ssh: {key: ~/keys/id}}"))
    assert cluster.nodes["b"].ssh.key == folder / "keys/id"


def test_pinned_host_keys_lie_in_the_state_directory_unless_the_file_says_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKSTEP_STATE", str(folder / "state"))
    assert read(GOOD).known_hosts == folder / "state/training/known_hosts"


def test_sections_are_typed_and_defaults_stand_in_for_silence() -> None:
    cluster = read(GOOD)
    assert cluster.section("limits", Limits) == Limits(nofile=4096, memlock=8192)
    boxes = cluster.section("boxes", Boxes)
    assert boxes is not None
    assert boxes.manage == "check"
    assert boxes.model_extra == {
        "main": Pin(archive=Path("main.tar"), pins={"protobuf": "3.20"}, tags=("a", "b"))
    }
    assert cluster.section("shelves", Shelves) is None
    assert read(nodes("b: {address: 10.0.0.1}")).section("limits", Limits) == Limits()


def test_the_ssh_section_is_handed_on_to_the_role_that_declares_it() -> None:
    path = Path("c.yaml")
    path.write_text(GOOD)
    cluster = load(path, {**SECTIONS, "ssh": (Ssh, Ssh())})
    assert cluster.sections["ssh"] is cluster.ssh
    assert "ssh" not in load(path, SECTIONS).sections


def test_a_lone_node_may_be_reached_over_loopback() -> None:
    assert read(nodes("b: {address: 127.0.0.1}")).head.address == "127.0.0.1"


def test_addresses_are_compared_in_their_canonical_form() -> None:
    cluster = read(nodes("b: {address: 'fd00:0::0:1'}", "m: {address: 'FD00::2'}"))
    assert [node.address for node in cluster.nodes.values()] == ["fd00::1", "fd00::2"]
    mapped = read(nodes("b: {address: '::ffff:10.0.0.1'}"))
    assert mapped.head.address == "10.0.0.1"


# --- what is wrong with a file -----------------------------------------------------------------

NOT_A_NAME = (
    "is no host name: begin with a lower-case letter, go on with lower-case letters, "
    "digits and hyphens, end without a hyphen, at most 63 in all"
)
OTHER_MEANING = "means something else to YAML or to Lockstep: choose another name"
PEERS_USE = "give the address that the other nodes use"


@pytest.mark.parametrize("name", ["'-n'", "node_1", "a b", "node.1", "$(x)", "Node1", "1st", "n-"])
def test_a_name_that_a_shell_or_dns_would_take_apart_is_refused(name: str) -> None:
    plain = name.strip("'")
    assert wrong(nodes(f"{name}: {{address: 10.0.0.1}}")) == [
        f"c.yaml:3: nodes.{plain}: {plain!r} {NOT_A_NAME}"
    ]


@pytest.mark.parametrize("name", ["no", "y", "on", "'null'", "'true'", "all", "localhost", "head"])
def test_a_name_with_a_meaning_of_its_own_is_refused(name: str) -> None:
    plain = name.strip("'")
    assert wrong(nodes(f"{name}: {{address: 10.0.0.1}}")) == [
        f"c.yaml:3: nodes.{plain}: {plain!r} {OTHER_MEANING}"
    ]


def test_a_name_of_64_letters_is_refused_and_one_of_63_is_not() -> None:
    assert wrong(nodes(f"{'n' * 64}: {{address: 10.0.0.1}}")) == [
        f"c.yaml:3: nodes.{'n' * 64}: {'n' * 64!r} {NOT_A_NAME}"
    ]
    assert read(nodes(f"{'n' * 63}: {{address: 10.0.0.1}}")).head.name == "n" * 63


@pytest.mark.parametrize("name", ["1", "1e3", "010", "true", "null"])
def test_a_name_that_is_no_text_to_yaml_is_refused(name: str) -> None:
    with pytest.raises(SyntaxProblem, match=rf"^c\.yaml:3: nodes: .*\b{name} is "):
        read(nodes(f"{name}: {{address: 10.0.0.1}}"))


def test_a_node_declared_twice_is_named_with_both_lines() -> None:
    with pytest.raises(SyntaxProblem) as caught:
        read(nodes("b: {address: 10.0.0.1}", "b: {address: 10.0.0.2}"))
    assert str(caught.value) == "c.yaml:4: nodes.b: stands twice, in line 3 and in line 4"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("node1.lan", f"'node1.lan' is no IP address: {PEERS_USE}"),
        ("10.0.0.256", f"'10.0.0.256' is no IP address: {PEERS_USE}"),
        ("10.0.0.1/24", "'10.0.0.1/24' is no IP address: leave the prefix length out"),
        ("0.0.0.0", f"0.0.0.0 cannot be a node's address: {PEERS_USE}"),
        ("0.1.2.3", f"0.1.2.3 cannot be a node's address: {PEERS_USE}"),
        ("'::'", f":: cannot be a node's address: {PEERS_USE}"),
        ("224.0.0.1", f"224.0.0.1 cannot be a node's address: {PEERS_USE}"),
        ("'ff02::1'", f"ff02::1 cannot be a node's address: {PEERS_USE}"),
        ("'fd00::1%eth0'", f"fd00::1%eth0 cannot be a node's address: {PEERS_USE}"),
        ("169.254.1.1", f"169.254.1.1 is link-local, valid on one cable only: {PEERS_USE}"),
        ("'fe80::1'", f"fe80::1 is link-local, valid on one cable only: {PEERS_USE}"),
        (
            "255.255.255.255",
            f"255.255.255.255 is reserved and cannot be a node's address: {PEERS_USE}",
        ),
        ("10", "must be text, not 10: put it in quotes"),
        ("10.1", "must be text, not 10.1: put it in quotes"),
        ("[10.0.0.1]", "must be text, not a list"),
        ("", "must be text, not nothing"),
    ],
)
def test_an_address_that_no_peer_could_use_is_refused(address: str, sentence: str) -> None:
    text = nodes("m: {address: 10.0.0.2}", "b:", f"  address: {address}")
    assert wrong(text) == [f"c.yaml:5: nodes.b.address: {sentence}"]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_beside_other_nodes_is_refused(address: str) -> None:
    other = "10.0.0.1" if "." in address else "fd00::1"
    text = nodes(f"m: {{address: '{other}'}}", f"b: {{address: '{address}'}}")
    assert wrong(text) == [
        f"c.yaml:4: nodes.b.address: peers cannot reach {address}, which is loopback"
    ]


@pytest.mark.parametrize(
    ("entries", "sentences"),
    [
        (
            ["m: {address: 10.0.0.1}", "b: {address: 10.0.0.1}"],
            ["c.yaml:4: nodes.b.address: 10.0.0.1 is also the address of m (line 3)"],
        ),
        (
            ["m: {address: 'fd00::1'}", "b: {address: 'fd00:0:0::1'}"],
            ["c.yaml:4: nodes.b.address: fd00::1 is also the address of m (line 3)"],
        ),
        (
            ["m: {address: 10.0.0.1}", "b: {address: 'fd00::1'}"],
            [
                "c.yaml:4: nodes.b.address: fd00::1 is IPv6, but 10.0.0.1 of m is not: "
                "give all nodes addresses of one kind"
            ],
        ),
        (
            ["m: {address: 10.0.0.1, local: true}", "b: {address: 10.0.0.2, local: true}"],
            ["c.yaml:4: nodes.b.local: m is the control machine already; only one node can be"],
        ),
        (
            ["b: {address: 10.0.0.1, gpu_class: a100}"],
            [
                "c.yaml:3: nodes.b.gpu_class: 'a100' contradicts gpus: 0; "
                "say how many GPUs the node has"
            ],
        ),
        (
            ["b: {address: 10.0.0.1, gpus: 8, gpu_class: A100 80GB}"],
            [
                "c.yaml:3: nodes.b.gpu_class: 'A100 80GB' is no GPU class: "
                "use lower-case letters, digits and hyphens"
            ],
        ),
        (
            ["b: {address: 10.0.0.1, gpus: -1}"],
            ["c.yaml:3: nodes.b.gpus: must be a whole number of at least 0, not -1"],
        ),
        (
            ["b: {address: 10.0.0.1, gpus: 8.0}"],
            ["c.yaml:3: nodes.b.gpus: must be a whole number of at least 0, not 8.0"],
        ),
        (
            ["b: {address: 10.0.0.1, interface: eth0/1}"],
            [
                "c.yaml:3: nodes.b.interface: 'eth0/1' is no interface name: "
                "at most 15 characters, without spaces, '/' and ':'"
            ],
        ),
        (
            ["b: {address: 10.0.0.1, local: ja}"],
            ["c.yaml:3: nodes.b.local: must be true or false, not 'ja'"],
        ),
        (["b: {gpus: 1}"], ["c.yaml:3: nodes.b.address: is missing"]),
        (["b:"], ["c.yaml:3: nodes.b: must be a mapping with address, not nothing"]),
        (["b: 10.0.0.1"], ["c.yaml:3: nodes.b: must be a mapping with address, not '10.0.0.1'"]),
        (
            ["b:", "  adress: 10.0.0.1"],
            ["c.yaml:4: nodes.b.adress: unknown key; did you mean 'address'?"],
        ),
        (
            ["b: {address: 10.0.0.1, name: b}"],
            [
                "c.yaml:3: nodes.b.name: unknown key; "
                "valid here: address, ssh, gpus, gpu_class, interface, local"
            ],
        ),
    ],
)
def test_a_wrong_node_is_named_with_its_line(entries: list[str], sentences: list[str]) -> None:
    assert wrong(nodes(*entries)) == sentences


EXAMPLE = "as in 'nodes: {node1: {address: 10.0.0.11}}'"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("cluster: a", [f"c.yaml: nodes: is missing: name the nodes, {EXAMPLE}"]),
        (
            "cluster: a\nnodes: {}",
            [f"c.yaml:2: nodes: names no node; name at least one, {EXAMPLE}"],
        ),
        (
            "cluster: a\nnodes:",
            [f"c.yaml:2: nodes: must be a mapping of names to nodes, not nothing, {EXAMPLE}"],
        ),
        (
            "cluster: a\nnodes: [node1]",
            [f"c.yaml:2: nodes: must be a mapping of names to nodes, not a list, {EXAMPLE}"],
        ),
        (
            "nodes: {b: {address: 10.0.0.1}}",
            ["c.yaml: cluster: is missing: name the cluster, as in 'cluster: training'"],
        ),
        (
            nodes("b: {address: 10.0.0.1}").replace("lab", "Lab 1"),
            [f"c.yaml:1: cluster: 'Lab 1' {NOT_A_NAME}"],
        ),
        (
            nodes("b: {address: 10.0.0.1}").replace("lab", "7"),
            ["c.yaml:1: cluster: must be text, not 7: put it in quotes"],
        ),
        (
            nodes("b: {address: 10.0.0.1}") + "\nlimit: {}\nwhatever: 1",
            [
                "c.yaml:4: limit: unknown key; did you mean 'limits'?",
                "c.yaml:5: whatever: unknown key; "
                "valid here: cluster, ssh, nodes, job, limits, boxes, shelves",
            ],
        ),
        (
            nodes("b: {address: 10.0.0.1}") + "\njob: jobs/two.yaml",
            ["c.yaml:4: job: there is no job file jobs/two.yaml in the current directory"],
        ),
        (
            nodes("b: {address: 10.0.0.1}") + "\njob: /jobs/two.yaml",
            ["c.yaml:4: job: there is no job file /jobs/two.yaml"],
        ),
        (
            nodes("b: {address: 10.0.0.1}") + "\njob: [a]",
            ["c.yaml:4: job: must be text, not a list"],
        ),
        (
            nodes("b: {address: 10.0.0.1}") + "\njob: ~nobody-of-that-name/a.yaml",
            ["c.yaml:4: job: ~nobody-of-that-name/a.yaml: there is no such home directory"],
        ),
    ],
)
def test_a_wrong_top_level_key_is_named(text: str, sentences: list[str]) -> None:
    assert wrong(text) == sentences


def ssh(settings: str) -> str:
    """A file whose cluster-wide ssh is in line 2."""
    return f"cluster: lab\nssh: {settings}\nnodes: {{b: {{address: 10.0.0.1}}}}"


NO_SUDO = (
    "ops is not root and has no sudo, so nothing could be changed: "
    "add sudo: true, or sudo: {password_file: FILE}"
)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("{port: 0}", "port: must be a whole number between 1 and 65535, not 0"),
        ("{port: 70000}", "port: must be a whole number between 1 and 65535, not 70000"),
        (
            "{port: '22'}",
            "port: must be a whole number between 1 and 65535, not '22': remove the quotes",
        ),
        ("{port: 22:00}", "port: must be a whole number between 1 and 65535, not '22:00'"),
        ("{port: 1e3}", "port: must be a whole number between 1 and 65535, not 1e3"),
        ("{port: }", "port: must be a whole number between 1 and 65535, not nothing"),
        ("{prot: 22}", "prot: unknown key; did you mean 'port'?"),
        ("{user: 'a b', sudo: true}", "user: 'a b' is no user name"),
        ("{user: ops}", f"user: {NO_SUDO}"),
        ("{user: ops, sudo: false}", f"user: {NO_SUDO}"),
        ("{sudo: true}", "sudo: sudo contradicts the login user root: say sudo: false"),
        (
            "{user: ops, sudo: yes}",
            "sudo: must be true or false or a mapping with password_file, not 'yes'",
        ),
        (
            "{user: ops, sudo: {pasword_file: x}}",
            "sudo.pasword_file: unknown key; did you mean 'password_file'?",
        ),
        ("{user: ops, sudo: {}}", "sudo.password_file: is missing"),
        (
            "{user: ops, sudo: {password_file: 3}}",
            "sudo.password_file: must be a path, not 3: put it in quotes",
        ),
        ("{key: ''}", "key: must be a path, not ''"),
        ("{manage: manged}", "manage: must be 'managed', 'check' or 'unmanaged', not 'manged'; did you mean 'managed'?"),
        ("{key: ~nobody-of-that-name/id}", "key: ~nobody-of-that-name/id: there is no such home directory"),
    ],
)  # fmt: skip
def test_a_wrong_login_is_named_with_what_would_be_right(settings: str, sentence: str) -> None:
    assert wrong(ssh(settings))[0] == f"c.yaml:2: ssh.{sentence}"


def test_a_contradictory_login_is_told_once_for_the_cluster_not_for_each_node() -> None:
    text = ssh("{user: ops}").replace("}}", "}, m: {address: 10.0.0.2}}")
    assert "m: {" in text
    assert wrong(text) == [f"c.yaml:2: ssh.user: {NO_SUDO}"]


def test_a_contradiction_that_a_node_brings_in_is_told_at_the_node() -> None:
    text = (
        "cluster: lab\nssh: {user: ops, sudo: true}\nnodes:\n  b: {address: 10.0.0.1}\n"
        "  m: {address: 10.0.0.2, ssh: {user: root}}\n"
        "  l: {address: 10.0.0.3, ssh: {sudo: false}}\n"
    )
    assert wrong(text) == [
        "c.yaml:5: nodes.m.ssh.user: sudo contradicts the login user root: say sudo: false",
        f"c.yaml:6: nodes.l.ssh.sudo: {NO_SUDO}",
    ]


@pytest.mark.parametrize(
    ("name", "text", "mode", "sentence"),
    [
        ("keys/none", None, 0, "there is no file {path}"),
        (
            "keys/open",
            PRIVATE_KEY,
            0o644,
            "{path} is open to other users (mode 0644): run chmod 600 {path}",
        ),
        (
            "keys/group",
            PRIVATE_KEY,
            0o640,
            "{path} is open to other users (mode 0640): run chmod 600 {path}",
        ),
        (
            "keys/id.pub",
            "ssh-ed25519 AAAA me",
            0o644,
            "{path} is a public key: name the private one, {folder}/keys/id",
        ),
        ("keys/pub", "ssh-rsa AAAA", 0o644, "{path} is a public key: name the private one"),
        (
            "keys/ppk",
            "PuTTY-User-Key-File-3: ssh-ed25519",
            0o600,
            "{path} is a PuTTY key: convert it with puttygen -O private-openssh",
        ),
        ("keys/text", "hello", 0o600, NO_KEY),
        ("keys/damaged", DAMAGED_KEY, 0o600, NO_KEY),
        (
            "keys/encrypted",
            ENCRYPTED_KEY,
            0o600,
            "{path} is encrypted: leave 'key' out and give it to ssh-agent (ssh-add), "
            "or name one without a passphrase",
        ),
    ],
)
def test_a_key_that_ssh_could_not_use_is_named(
    folder: Path, name: str, text: str | None, mode: int, sentence: str
) -> None:
    if text is not None:
        secret(name, text, mode)
    expected = sentence.format(path=folder / name, folder=folder)
    assert wrong(ssh(f"{{key: {name}}}")) == [f"c.yaml:2: ssh.key: {expected}"]


def test_a_directory_in_place_of_a_key_is_named(folder: Path) -> None:
    assert wrong(ssh("{key: keys, known_hosts: jobs}")) == [
        f"c.yaml:2: ssh.key: {folder}/keys is a directory, not a file",
        f"c.yaml:2: ssh.known_hosts: {folder}/jobs is a directory, not a file",
    ]


@pytest.mark.parametrize(
    ("text", "mode", "sentence"),
    [
        (None, 0, "there is no file {path}"),
        ("geheim", 0o604, "{path} is open to other users (mode 0604): run chmod 600 {path}"),
        ("\nsecond line\n", 0o600, "{path} is empty: its first line must be the password"),
        ("", 0o600, "{path} is empty: its first line must be the password"),
    ],
)
def test_a_password_file_that_cannot_serve_is_named(
    folder: Path, text: str | None, mode: int, sentence: str
) -> None:
    if text is not None:
        secret("keys/pw", text, mode)
    expected = sentence.format(path=folder / "keys/pw")
    assert wrong(ssh("{user: ops, sudo: {password_file: keys/pw}}")) == [
        f"c.yaml:2: ssh.sudo.password_file: {expected}"
    ]


def test_a_path_that_is_too_long_for_the_system_is_a_problem_not_a_crash(folder: Path) -> None:
    long = "x" * 300
    text = ssh(f"{{key: {long}, known_hosts: {long}}}") + f"\njob: {long}"
    assert wrong(text) == [
        f"c.yaml:2: ssh.key: {folder}/{long} cannot be read: file name too long",
        f"c.yaml:4: job: there is no job file {long} in the current directory",
    ]


def test_files_are_judged_even_when_other_keys_beside_them_are_wrong(folder: Path) -> None:
    assert wrong(ssh("{port: 0, key: keys/none}")) == [
        f"c.yaml:2: ssh.key: there is no file {folder}/keys/none",
        "c.yaml:2: ssh.port: must be a whole number between 1 and 65535, not 0",
    ]


def section(text: str) -> str:
    """A file whose section stands in line 4 and after."""
    return nodes("b: {address: 10.0.0.1}") + "\n" + text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("limits: [a]", ["c.yaml:4: limits: must be a mapping, not a list"]),
        ("limits:", ["c.yaml:4: limits: must be a mapping, not nothing"]),
        (
            "limits:\n  nofiles: 1",
            ["c.yaml:5: limits.nofiles: unknown key; did you mean 'nofile'?"],
        ),
        (
            "limits:\n  nofile: 1\n  memlock: 3",
            [
                "c.yaml:5: limits.nofile: must be a whole number of at least 256, not 1",
                "c.yaml:6: limits.memlock: "
                "must be a whole number of at least 64 or 'unlimited', not 3",
            ],
        ),
        (
            "limits: {memlock: unlimitd}",
            [
                "c.yaml:4: limits.memlock: must be a whole number of at least 64 or 'unlimited', "
                "not 'unlimitd'; did you mean 'unlimited'?"
            ],
        ),
        (
            "limits: {share: 2}",
            ["c.yaml:4: limits.share: must be a number above 0 and of at most 1, not 2"],
        ),
        ("limits: {enabled: 1}", ["c.yaml:4: limits.enabled: must be true or false, not 1"]),
        (
            "limits: {folder: true}",
            ["c.yaml:4: limits.folder: must be a path, not true: put it in quotes"],
        ),
        (
            "limits: {label: ''}",
            ["c.yaml:4: limits.label: must be text that is not empty, not ''"],
        ),
        (
            "limits: {hosts: []}",
            ["c.yaml:4: limits.hosts: must be a list that is not empty, not an empty list"],
        ),
        ("limits: {hosts: a}", ["c.yaml:4: limits.hosts: must be a list that is not empty, not 'a'"]),
        (
            "limits:\n  peers:\n    - 10.0.0.1\n    - x",
            [f"c.yaml:7: limits.peers[1]: 'x' is no IP address: {PEERS_USE}"],
        ),
        (
            "boxes:\n  main:\n    archive: a\n    pins:\n      protobuf: 3.20",
            [
                "c.yaml:8: boxes.main.pins.protobuf: "
                "3.20 must be quoted, so that YAML keeps it as written: '3.20'"
            ],
        ),
        (
            "boxes:\n  main:\n    archve: a",
            ["c.yaml:6: boxes.main.archve: unknown key; did you mean 'archive'?"],
        ),
        (
            "boxes:\n  main:\n    tags: [a, 1]",
            [
                "c.yaml:5: boxes.main.archive: is missing",
                "c.yaml:6: boxes.main.tags[1]: must be text, not 1: put it in quotes",
            ],
        ),
        ("boxes: {main: 3}", ["c.yaml:4: boxes.main: must be a mapping with archive, not 3"]),
        (
            "shelves:\n  top:\n    archve: a\n  low:\n    archive: b\n    tags: [1]",
            [
                "c.yaml:6: shelves.top.archve: unknown key; did you mean 'archive'?",
                "c.yaml:9: shelves.low.tags[0]: must be text, not 1: put it in quotes",
            ],
        ),
    ],
)  # fmt: skip
def test_a_wrong_section_is_named_with_line_key_and_what_would_be_right(
    text: str, sentences: list[str]
) -> None:
    assert wrong(section(text)) == sentences


def test_a_reshaped_section_takes_lists_and_paths_like_any_other() -> None:
    cluster = read(section("shelves: {top: {archive: a.tar, tags: [x]}}"))
    assert cluster.section("shelves", Shelves) == Shelves.model_validate(
        {"top": Pin(archive=Path("a.tar"), tags=("x",))}
    )


def test_a_secret_value_is_never_shown() -> None:
    assert wrong(section("limits: {token: [hunter2]}")) == [
        "c.yaml:4: limits.token: must be text, not what is given"
    ]


def test_contradictions_between_sections_have_the_line_of_their_key() -> None:
    text = section("limits:\n  nofile: 666\n  peers:\n    - 10.0.0.1\n    - 10.0.0.2")
    assert wrong(text) == [
        "c.yaml:5: limits.nofile: is too few for 1 nodes",
        "c.yaml:8: limits.peers[1]: is one too many",
    ]
    assert wrong(section("limits:\n  label: odd")) == ["c.yaml:4: limits: contradicts itself"]


def test_contradictions_are_asked_for_only_when_the_rest_is_right() -> None:
    assert wrong(section("limits: {nofile: 666, share: 2}")) == [
        "c.yaml:4: limits.share: must be a number above 0 and of at most 1, not 2"
    ]


def test_all_problems_of_a_file_are_told_at_once_in_the_order_of_lines() -> None:
    text = (
        "cluster: Lab\nssh: {port: 0}\nnodes:\n  no: {address: 10.0.0.1}\n"
        "  b: {adress: 10.0.0.2}\njob: none.yaml\nlimits: {nofile: x}\nnods: 1\n"
    )
    assert [line.partition(": ")[0] for line in wrong(text)] == [
        f"c.yaml:{line}" for line in (1, 2, 4, 5, 6, 7, 8)
    ]


# --- which file --------------------------------------------------------------------------------


def test_the_environment_names_the_cluster_file_before_the_users_and_the_labs(
    folder: Path,
) -> None:
    (folder / "inventory").mkdir()
    (folder / "other.yaml").write_text("")
    (folder / "inventory/lab.yaml").write_text("")
    assert default_path({}, folder) == folder / "inventory/lab.yaml"
    (folder / "inventory/cluster.yaml").write_text("")
    assert default_path({}, folder) == folder / "inventory/cluster.yaml"
    assert default_path({"LOCKSTEP_CLUSTER": ""}, folder) == folder / "inventory/cluster.yaml"
    assert default_path({"LOCKSTEP_CLUSTER": "other.yaml"}, folder) == Path("other.yaml")


def test_without_a_cluster_file_the_sentence_says_how_to_get_one(folder: Path) -> None:
    with pytest.raises(FileProblem) as caught:
        default_path({}, folder)
    assert str(caught.value) == (
        "inventory/cluster.yaml: there is no cluster file: copy inventory/example.yaml to it and "
        "fill it in, or run 'lockstep lab up' for throw-away nodes, or set LOCKSTEP_CLUSTER"
    )


def test_a_missing_file_that_the_environment_names_is_not_replaced_by_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "inventory").mkdir()
    (folder / "inventory/cluster.yaml").write_text(GOOD)
    monkeypatch.setenv("LOCKSTEP_CLUSTER", "gone.yaml")
    with pytest.raises(FileProblem) as caught:
        load(None, SECTIONS)
    assert str(caught.value) == (
        "gone.yaml: no such file; the environment variable LOCKSTEP_CLUSTER names it"
    )


def test_no_path_means_the_file_of_the_current_directory(folder: Path) -> None:
    (folder / "inventory").mkdir()
    (folder / "inventory/cluster.yaml").write_text(nodes("b: {address: 10.0.0.1}"))
    assert load(None, SECTIONS).path == folder / "inventory/cluster.yaml"


# --- any file ----------------------------------------------------------------------------------

PIECES = [
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!x ",
    "\t",
    "'",
    '"',
    "#",
    "\n",
    "  ",
    "---\n",
]
VALUES: list[Any] = [None, True, -1, 0, 1e9, 70000, "", "no", "x y", [], [1], {}, {"a": 1}, [[{}]]]


def mutated_text(text: str, chance: random.Random) -> str:
    """Pieces of the file removed, doubled, or replaced by what has a meaning in YAML."""
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(text) + 1)
        end = start + chance.choice([0, 1, 1, 5, 30])
        piece = chance.choice([*PIECES, text[start:end] * 2, chr(chance.randrange(0x10FFFF))])
        text = text[:start] + piece + text[end:]
    return text


def mutated_values(value: Any, chance: random.Random) -> Any:
    """The same data with some values replaced, keys renamed or left out."""
    if chance.random() < 0.06:
        return chance.choice(VALUES)
    if isinstance(value, dict):
        return {
            (chance.choice(["x", "no", "sudo"]) if chance.random() < 0.05 else key): below
            for key, below in ((key, mutated_values(one, chance)) for key, one in value.items())
            if chance.random() > 0.05
        }
    return value


@pytest.mark.parametrize("seed", range(4))
def test_no_file_however_broken_ends_in_anything_but_a_problem_with_a_sentence(seed: int) -> None:
    chance = random.Random(seed)
    outcomes = {"right": 0, "wrong": 0}
    path = Path("c.yaml")
    for number in range(120):
        if number % 2:
            path.write_bytes(mutated_text(GOOD, chance).encode("utf-8", "surrogatepass"))
        else:
            path.write_text(yaml.safe_dump(mutated_values(yaml.safe_load(GOOD), chance)))
        try:
            load(path, SECTIONS)
            outcomes["right"] += 1
        except InventoryProblem as problem:
            outcomes["wrong"] += 1
            for line in str(problem).splitlines():
                assert line.startswith(("c.yaml: ", "c.yaml:"))
    assert outcomes["wrong"] > 60


# --- the example -------------------------------------------------------------------------------


class Anything(Spec):
    """A role's section, whose own tests judge what stands in it."""

    model_config = ConfigDict(extra="allow")


def test_the_example_is_a_right_cluster_file_of_two_gpu_nodes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / ".ssh").mkdir()
    secret(".ssh/id_ed25519", PRIVATE_KEY)
    sections = dict.fromkeys(("limits", "storage", "packages", "environments"), (Anything, None))
    example = Path(loader.__file__).parent / "example.yaml"
    cluster = load(example, sections)
    assert [(node.gpus, node.ssh.user, node.ssh.sudo) for node in cluster.nodes.values()] == [
        (8, "ops", True)
    ] * 2
    assert set(cluster.sections) == {"limits", "storage", "environments"}
