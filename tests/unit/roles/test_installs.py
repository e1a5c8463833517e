"""What a bundle gathers for a node: the packages of each role, by the node's own system and kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from roles import registry
from roles.core.look import split, target_of

LOOKS = Path(__file__).parent / "looks"
CLUSTER = registry.read(LOOKS / "cluster.yaml")
ROLES = {role.name: role for role in registry.ROLES}


def installs(node: str, name: str, declared: dict[str, Any] | None = None, **state: Any) -> Any:
    """A role's packages on a recorded node; with other things declared, or another state."""
    role = ROLES[name]
    section = split((LOOKS / f"{node}.txt").read_text().rstrip("\n"), "")[name]
    target = target_of(role, CLUSTER, node)
    assert target is not None and role.installs is not None
    if declared is not None:
        target = replace(target, spec=role.spec.model_validate(declared))
    found = role.parse(section.text)
    return list(role.installs(target, replace(found, **state) if state else found))


@pytest.mark.parametrize(
    ("name", "debian", "rpm"),
    [
        (
            "packages",
            ["pdsh", "rsync", "zstd", "nftables"],
            ["pdsh", "pdsh-rcmd-ssh", "rsync", "zstd", "nftables"],
        ),
        ("time", ["chrony"], ["chrony"]),
        ("pdsh", ["pdsh"], ["pdsh", "pdsh-rcmd-ssh"]),
        ("fabric", ["opensm"], []),
        (
            "compiler",
            ["gcc", "g++", "ninja-build", "python3.11-dev"],
            ["gcc", "gcc-c++", "ninja-build", "/usr/include/python3.11/Python.h"],
        ),
        ("driver", ["dkms"], []),
        (
            "nccl",
            ["libnccl2=2.20.5-*", "libnccl-dev=2.20.5-*"],
            ["libnccl-2.20.5-*", "libnccl-devel-2.20.5-*"],
        ),
    ],
)
def test_converged_nodes_may_need_the_same_again(
    name: str, debian: list[str], rpm: list[str]
) -> None:
    assert installs("node1", name) == debian
    assert installs("node2", name) == rpm


def test_no_role_that_installs_is_forgotten() -> None:
    callers = {
        path.parent.name
        for path in Path(registry.__file__).parent.glob("*/converge.py")
        if "yield installing(" in path.read_text() or "yield exactly(" in path.read_text()
    }
    assert callers == {name for name, role in ROLES.items() if role.installs is not None}


def test_nccl_follows_torch_or_the_exact_version() -> None:
    exact = {"version": "2.21.5-1+cuda12.4", "dev": False}
    assert installs("node1", "nccl", exact, packages={}) == ["libnccl2=2.21.5-1+cuda12.4"]
    facts = {"torch": "2.5.1+cu124", "nccl": "2.21.5"}
    auto = {"version": "auto", "dev": False}
    assert installs("node1", "nccl", auto, facts=facts, packages={}) == [
        "libnccl2=2.21.5-*+cuda12.*"
    ]
    assert installs("node2", "nccl", auto, facts={}) == []


def test_headers_that_lack_and_declared_packages_come_with_the_driver() -> None:
    declared = {
        "version": "535.154.05",
        "nodes": ["node1"],
        "packages": {"nvidia-dkms": "535.154.05-1"},
    }
    found = installs("node1", "driver", declared)
    assert found == ["dkms", "nvidia-dkms=535.154.05-1"]
    role = ROLES["driver"]
    section = split((LOOKS / "node1.txt").read_text().rstrip("\n"), "")["driver"]
    kernels = tuple(replace(each, headers=False) for each in role.parse(section.text).kernels)
    names = installs("node1", "driver", declared, kernels=kernels)
    assert [name.startswith("linux-headers-") for name in names] == [False, True, False]
