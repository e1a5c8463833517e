"""InfiniBand from sysfs: ports that wait for a subnet manager, which node runs it, and who may use it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.fabric import FabricSpec, FabricState, role
from roles.fabric.adapters import show, usable, variables
from roles.fabric.probe import parse, probe
from roles.limits.spec import LimitsSpec
from roles.packages import PackagesSpec
from roles.packages.converge import installing

RECORDED = Path(__file__).parent / "recorded"
NODES = {name: Node(name=name, address=f"10.0.0.{name[-1]}") for name in ("node1", "node2")}


def recorded(name: str) -> FabricState:
    return parse((RECORDED / f"{name}.txt").read_text().strip("\n"))


def with_verbs(state: FabricState) -> FabricState:
    return replace(state, verbs=True)


ACTIVE, WAITING = with_verbs(recorded("manager-active")), with_verbs(recorded("waiting"))
NONE = recorded("none")
DOWN = replace(
    ACTIVE, ports=(replace(ACTIVE.ports[0], state="DOWN", physical="Polling"),), managers=()
)


def target(name: str = "node1", limits: Any = None, **declared: Any) -> Target[FabricSpec]:
    sections = {"limits": limits or LimitsSpec(), "fabric": FabricSpec(**declared)}
    cluster = Cluster("c", Path("c.yaml"), NODES, sections=sections)
    return Target(cluster, NODES[name], FabricSpec(**declared))


def found(of: Target[FabricSpec], state: FabricState, **peers: FabricState) -> list[Finding]:
    return role.drift(of, state, peers)


def ids(of: Target[FabricSpec], state: FabricState, **peers: FabricState) -> list[str]:
    return [finding.id for finding in found(of, state, **peers)]


def steps(of: Target[FabricSpec], state: FabricState, **peers: FabricState) -> list[Shell]:
    now = [finding for finding in found(of, state, **peers) if finding.repairable]
    made = list(role.converge(of, state, peers, now))
    shells = [step for step in made if isinstance(step, Shell)]
    assert shells == made
    return shells


def tree(root: Path, **ports: tuple[str, str, str]) -> None:
    """A tree as the kernel shows it; each port: state, physical state, link layer."""
    for adapter, (state, physical, layer) in ports.items():
        port = root / "class/infiniband" / adapter / "ports/1"
        port.mkdir(parents=True)
        for file, text in (
            ("state", state), ("phys_state", physical), ("link_layer", layer),
            ("rate", "100 Gb/sec (4X EDR)"),
        ):  # fmt: skip
            (port / file).write_text(f"{text}\n")


def look(root: Path, tmp_path: Path) -> FabricState:
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    fake = tools / "systemctl"
    fake.write_text(
        "#!/bin/sh\nprintf 'Id=opensm.service\\nLoadState=not-found\\nActiveState=inactive\\n'\n"
    )
    fake.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", probe(target(sysfs=str(root)))],
        capture_output=True, text=True, check=False, env={"PATH": f"{tools}:/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.rstrip("\n"))


def test_a_node_without_adapters_has_nothing_to_do() -> None:
    assert ids(target(), NONE) == [] and ids(target(subnet_manager="node1"), NONE) == []
    assert NONE.summary == "none"


def test_active_ports_need_nothing() -> None:
    assert ids(target(subnet_manager="node1"), ACTIVE) == []
    assert ACTIVE.summary == "1 x InfiniBand 200 Gb/sec (4X HDR)"


def test_a_port_that_waits_starts_opensm_on_the_declared_node_and_waits_for_it() -> None:
    of = target(subnet_manager="node1")
    assert ids(of, WAITING) == ["opensm-stopped", "ib-port-initializing"]
    start, wait = steps(of, WAITING)
    done = start.command.splitlines()
    assert done.index("systemctl enable -q opensm.service") < done.index("systemctl start opensm.service")  # fmt: skip
    assert "opensmd" not in start.command
    assert "/sys/class/infiniband/mlx5_0/ports/1/state" in wait.command


def test_the_other_nodes_start_nothing_and_only_wait() -> None:
    of = target("node2", subnet_manager="node1")
    (step,) = steps(of, WAITING, node1=WAITING)
    assert "systemctl" not in step.command


def test_a_manager_that_cannot_be_read_or_has_no_adapter_is_not_waited_for() -> None:
    of = target("node2", subnet_manager="node1")
    for peers in ({}, {"node1": NONE}):
        (finding,) = found(of, WAITING, **peers)
        assert not finding.repairable and "node1" in finding.fix
    (finding,) = found(of, WAITING, node1=replace(WAITING, managers=()))
    assert finding.repairable  # it is installed there first


def test_without_a_declared_manager_the_user_is_told_and_opensm_is_left_alone() -> None:
    (finding,) = found(target(), WAITING)
    assert not finding.repairable and "fabric.subnet_manager" in finding.fix
    assert ids(target(), ACTIVE) == []
    assert ids(target(rdma="off"), WAITING) == []


def test_a_second_subnet_manager_is_switched_off() -> None:
    of = target("node2", subnet_manager="node1")
    (finding,) = found(of, ACTIVE, node1=ACTIVE)
    assert (finding.id, finding.disturbs, finding.shared) == ("opensm-elsewhere", True, True)
    (step,) = steps(of, ACTIVE, node1=ACTIVE)
    assert step.command == "systemctl disable -q --now opensm.service"


@pytest.mark.parametrize("packager", ["apt", "rpm"])
def test_a_missing_opensm_is_installed_started_and_waited_for(packager: Any) -> None:
    of = target(subnet_manager="node1")
    bare = replace(WAITING, managers=(), packager=packager)
    assert ids(of, bare) == ["opensm-missing", "ib-port-initializing"]
    install, start, wait = steps(of, bare)
    assert install == installing(PackagesSpec(), packager, ["opensm"])
    assert "systemctl start opensm.service" in start.command and "ACTIVE" in wait.command


@pytest.mark.parametrize(
    ("packager", "package"), [("apt", "ibverbs-providers"), ("rpm", "libibverbs")]
)
def test_a_missing_libibverbs_is_installed_under_its_systems_name(
    packager: Any, package: str
) -> None:
    state = replace(ACTIVE, verbs=False, packager=packager)
    (finding,) = found(target(), state)
    assert finding.id == "ib-disabled-slow" and package in finding.fix
    (install,) = steps(target(), state)
    assert install == installing(PackagesSpec(), packager, [package])


def test_a_port_without_link_matters_only_where_others_have_one() -> None:
    assert ids(target(), DOWN) == [] and ids(target(), DOWN, node2=DOWN) == []
    (finding,) = found(target(), DOWN, node2=ACTIVE)
    assert finding.id == "ib-link-down" and "Polling" in finding.seen


def test_roce_never_needs_a_subnet_manager(tmp_path: Path) -> None:
    tree(tmp_path / "sys", mlx5_0=("2: INIT", "5: LinkUp", "Ethernet"), mlx5_1=("4: ACTIVE", "5: LinkUp", "Ethernet"))  # fmt: skip
    state = with_verbs(look(tmp_path / "sys", tmp_path))
    assert state.adapters == ("mlx5_0", "mlx5_1")
    assert ids(target(), state) == []
    assert state.summary == "1 x Ethernet 100 Gb/sec (4X EDR)"


def test_physical_states_of_two_words_are_read(tmp_path: Path) -> None:
    """As the kernel's drivers/infiniband/core/sysfs.c writes them."""
    tree(
        tmp_path / "sys",
        mlx5_0=("1: DOWN", "7: Phy Test", "InfiniBand"),
        mlx5_1=("0: NOP", "0: <unknown>", "InfiniBand"),
    )
    ports = look(tmp_path / "sys", tmp_path).ports
    assert [str(port) for port in ports] == [
        "mlx5_0 port 1 DOWN (Phy Test)",
        "mlx5_1 port 1 NOP (<unknown>)",
    ]


def test_a_recorded_tree_serves_as_a_node(tmp_path: Path) -> None:
    tree(tmp_path / "a tree", mlx5_0=("2: INIT", "5: LinkUp", "InfiniBand"))
    state = look(tmp_path / "a tree", tmp_path)
    assert "ib-port-initializing" in ids(target(), with_verbs(state))
    done = subprocess.run(
        ["sh", "-c", show(target(sysfs=str(tmp_path / "a tree")).cluster)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "adapter mlx5_0\n"


def test_a_card_without_driver_is_named(tmp_path: Path) -> None:
    card = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    card.mkdir(parents=True)
    (card / "class").write_text("0x020700\n")
    state = look(tmp_path / "sys", tmp_path)
    assert steps(target(), state) == [] and state.idle == ("0000:3b:00.0",)
    assert ids(target(), state) == ["ib-disabled-slow"] and ids(target(rdma="off"), state) == []


def test_locked_memory_must_be_unlimited_where_adapters_are_used() -> None:
    low = LimitsSpec(memlock=65536)
    assert ids(target(limits=low), ACTIVE) == ["memlock"]
    assert ids(target(limits=low), NONE) == [] and ids(target(limits=low, rdma="off"), ACTIVE) == []


def test_nccl_uses_adapters_on_all_nodes_of_a_job_or_on_none() -> None:
    cluster = target().cluster
    assert usable(cluster, [("mlx5_0",), ("mlx5_1",)]) and not usable(cluster, [("mlx5_0",), ()])
    assert not usable(target(rdma="off").cluster, [("mlx5_0",)])
    assert variables(True) == {} and variables(False) == {"NCCL_IB_DISABLE": "1"}


def test_an_old_init_script_is_enabled_by_its_links() -> None:
    text = (RECORDED / "manager-active.txt").read_text().strip("\n")
    old = text.replace("UnitFileState=enabled", "UnitFileState=generated")
    assert [each.enabled for each in parse(old).managers] == [False]
    assert [each.enabled for each in parse(old.replace("verbs", "starts\nverbs")).managers] == [
        True
    ]


def test_the_subnet_manager_is_a_node_of_the_file() -> None:
    (problem,) = FabricSpec(subnet_manager="node9").problems(target().cluster)
    assert problem[0] == "subnet_manager" and "node1, node2" in problem[1]


@pytest.mark.parametrize("text", ["", "end", "未找到命令\nend", "verbs maybe\nend", "port mlx5_0 1 state 初始化\nverbs no\nend"])  # fmt: skip
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_what_no_lab_can_break_has_its_entry_in_the_symptoms() -> None:
    folder = Path(__file__).parents[4]
    known = {
        each["id"] for each in yaml.safe_load((folder / "roles/fabric/symptoms.yaml").read_text())
    }
    assert {"ib-link-down", "ib-disabled-slow", "opensm-missing", "memlock"} <= known
