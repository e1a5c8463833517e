"""``lockstep env diff`` where it cannot be answered: one sentence, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.env_cli import EnvError, chosen, chosen_nodes
from roles import registry

CLUSTER = """\
cluster: two
nodes: {node1: {address: 192.0.2.1}, node2: {address: 192.0.2.2}}
storage: {kind: existing, path: /data}
"""
ONE = "environments: {main: {archive: main.tar}}\n"
TWO = "environments: {main: {archive: main.tar}, more: {archive: main.tar, on_path: false}}\n"


@pytest.mark.parametrize(
    ("more", "nodes", "name", "sentence"),
    [
        (ONE, ("node1", "nod2"), None, "declares no node 'nod2': did you mean node2?"),
        (ONE, ("node1", "x"), None, "declares no node 'x': its nodes are node1, node2"),
        (ONE, ("node1", "node1"), None, "node1 is compared with itself: name another node"),
        (ONE, ("node1", "node2"), "x", "declares no environment 'x': it has main"),
        (TWO, ("node1", "node2"), None, "several environments: add --environment, of main, more"),
        ("", ("node1", "node2"), None, "declares no environment"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    tmp_path: Path, more: str, nodes: tuple[str, str], name: str | None, sentence: str
) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + more)
    cluster = registry.read(tmp_path / "cluster.yaml")
    with pytest.raises(EnvError) as caught:
        chosen_nodes(cluster, *nodes)
        chosen(cluster, name)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_environment_is_the_only_one_or_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + ONE)
    assert chosen(registry.read(tmp_path / "cluster.yaml"), None).name == "main"
    (tmp_path / "cluster.yaml").write_text(CLUSTER + TWO)
    assert chosen(registry.read(tmp_path / "cluster.yaml"), "more").name == "more"


def test_a_mistake_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + ONE)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "env", "diff", "node1", "node3", "--json"],
        env=os.environ | {"LOCKSTEP_CLUSTER": str(tmp_path / "cluster.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lockstep: ") and done.stderr.count("\n") == 1
