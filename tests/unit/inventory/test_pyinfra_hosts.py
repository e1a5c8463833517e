"""pyinfra gets each node under its own name, with a pinned host key, and never shows a password."""

from __future__ import annotations

import json
import logging
import stat
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Inventory, StringCommand
from pyinfra.connectors.ssh import ConnectorData
from pyinfra.connectors.util import make_unix_command

from inventory import pyinfra_hosts
from inventory.cluster import Cluster, Node, Ssh, Sudo
from inventory.errors import FileProblem
from inventory.local_connector import ThisMachine
from inventory.pyinfra_hosts import LOCAL_CONNECTOR, hosts

SECRET = "ge heim'$(x)"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{SECRET}\nsecond line\n")
    return path


def cluster(*nodes: Node) -> Cluster:
    return Cluster("lab", Path("/lab.yaml"), {node.name: node for node in nodes})


def node(name: str = "node1", local: bool = False, **ssh: Any) -> Node:
    return Node(name=name, address="10.0.0.1", ssh=Ssh(**ssh), local=local)


def with_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pyproject.toml registers, also where the checkout is not installed."""
    entry = EntryPoint(
        LOCAL_CONNECTOR, "inventory.local_connector:ThisMachine", "pyinfra.connectors"
    )
    monkeypatch.setattr(pyinfra_hosts, "entry_points", lambda group: [entry])
    from pyinfra.api import connectors

    known = {**connectors.get_all_connectors(), LOCAL_CONNECTOR: ThisMachine}
    for name in ("get_all_connectors", "get_execution_connectors"):
        monkeypatch.setattr(f"pyinfra.api.inventory.{name}", lambda: known)


def test_a_node_is_reached_by_its_address_login_key_and_pinned_host_key(state: Path) -> None:
    found = hosts(cluster(node(user="ops", port=2222, key=Path("/keys/id"), sudo=True)))
    assert found == [
        (
            "node1",
            {
                "_sudo": True,
                "ssh_hostname": "10.0.0.1",
                "ssh_port": 2222,
                "ssh_user": "ops",
                "ssh_key": "/keys/id",
                "ssh_known_hosts_file": str(state / "lab/known_hosts"),
                "ssh_strict_host_key_checking": "accept-new",
                "ssh_connect_retries": 1,
                "ssh_paramiko_connect_kwargs": {"timeout": 5, "banner_timeout": 10},
            },
        )
    ]


def test_every_name_is_one_that_pyinfras_ssh_connector_reads() -> None:
    [(_, data)] = hosts(cluster(node(key=Path("/keys/id"))))
    assert {key for key in data if key != "_sudo"} <= set(ConnectorData.__annotations__)


def test_root_needs_no_sudo_and_no_key_is_named_where_the_agent_decides() -> None:
    [(_, data)] = hosts(cluster(node()))
    assert data["_sudo"] is False
    assert "ssh_key" not in data
    assert "_sudo_password" not in data


def test_hosts_stand_in_the_order_of_the_file() -> None:
    found = hosts(cluster(node("zoe"), node("amy"), node("bob")))
    assert [name for name, _ in found] == ["zoe", "amy", "bob"]


def test_the_file_of_pins_is_made_for_its_owner_alone_and_kept(state: Path) -> None:
    hosts(cluster(node()))
    pins = state / "lab/known_hosts"
    assert stat.S_IMODE(pins.stat().st_mode) == 0o600
    assert stat.S_IMODE(pins.parent.stat().st_mode) == 0o700
    pins.write_text("10.0.0.1 ssh-ed25519 AAAA\n")
    hosts(cluster(node()))
    assert pins.read_text() == "10.0.0.1 ssh-ed25519 AAAA\n"


def test_a_node_may_have_its_own_file_of_pins(tmp_path: Path, state: Path) -> None:
    [(_, data)] = hosts(cluster(node(known_hosts=tmp_path / "own")))
    assert data["ssh_known_hosts_file"] == str(tmp_path / "own")
    assert not state.exists()


def test_a_place_where_no_pins_can_be_kept_is_named(state: Path) -> None:
    state.write_text("a file, not a directory")
    with pytest.raises(FileProblem) as caught:
        hosts(cluster(node()))
    assert str(caught.value) == (
        f"{state}/lab/known_hosts: the pinned host keys cannot be kept here: not a directory"
    )


def test_pyinfra_puts_the_first_line_of_the_password_file_into_its_command_and_shows_a_mask(
    password_file: Path,
) -> None:
    [(_, data)] = hosts(cluster(node(user="ops", sudo=Sudo(password_file=password_file))))
    assert data["_sudo"] is True
    command = make_unix_command(
        StringCommand("id"),
        _sudo=True,
        _sudo_password=data["_sudo_password"],
        _sudo_askpass_path="/tmp/askpass",
    )
    assert """'ge heim'"'"'$(x)'""" in command.get_raw_value()
    assert "heim" not in str(command)


def test_a_password_shows_itself_in_no_output(
    password_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [(_, data)] = hosts(cluster(node(user="ops", sudo=Sudo(password_file=password_file))))
    logging.getLogger().warning("data %s %r", data["_sudo_password"], data)
    outputs = [
        repr(data),
        str(data),
        json.dumps(data, default=lambda value: value.to_json()),
        caplog.text,
        repr(data["_sudo_password"]),
    ]
    assert all("heim" not in output and "*MASKED*" in output for output in outputs)
    assert f"{data['_sudo_password']}" == SECRET


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the password cannot be read"),
        (b"\nx\n", "holds no password in its first line"),
        (b"\xff\xfe\n", "the password cannot be read"),
    ],
)
def test_a_password_file_that_changed_since_the_check_is_named(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "pw"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileProblem) as caught:
        hosts(cluster(node(user="ops", sudo=Sudo(password_file=path))))
    assert str(caught.value) == f"{path}: {sentence}"


def test_the_control_machine_as_a_node_has_its_name_and_no_ssh(
    monkeypatch: pytest.MonkeyPatch, state: Path, password_file: Path
) -> None:
    with_connector(monkeypatch)
    sudo = Sudo(password_file=password_file)
    found = hosts(cluster(node(local=True, user="ops", sudo=sudo), node("node2")))
    inventory = Inventory((found, {}))
    here, other = inventory.get_host("node1"), inventory.get_host("node2")
    assert here.connector_cls is ThisMachine
    assert other.connector_cls is not ThisMachine
    assert set(here.data.dict()) == {"_sudo", "_sudo_password"}
    assert [host.name for host in inventory] == ["node1", "node2"]


def test_the_control_machine_as_a_node_needs_the_installed_connector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pyinfra_hosts, "entry_points", lambda group: [])
    with pytest.raises(FileProblem) as caught:
        hosts(cluster(node(local=True)))
    assert str(caught.value) == (
        "/lab.yaml: nodes.node1: local: true needs Lockstep installed beside pyinfra: "
        "run pip install -e ."
    )
