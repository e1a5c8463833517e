"""``lockstep env`` where it cannot be answered: one sentence, and exit code 2; and what it says of leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.env_cli import EnvError, _asked, chosen, chosen_nodes, listing
from roles import registry
from roles.core import session
from roles.environment.spec import Declared

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
        (
            TWO,
            ("node1", "node2"),
            None,
            "several environments: name one with --environment: main, more",
        ),
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


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "node1", "node3"),
        ("leftovers", "node3"),
        ("diff", "node1", "node2", "--environment", "x"),
        ("leftovers", "node1", "--environment", "x"),
    ],
)
def test_a_mistake_ends_with_2_and_no_traceback(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + ONE)
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "env", *words, "--json"],
        env=os.environ | {"LOCKSTEP_CLUSTER": str(tmp_path / "cluster.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lockstep: ") and done.stderr.count("\n") == 1


def one_environment(tmp_path: Path) -> Declared:
    (tmp_path / "cluster.yaml").write_text(CLUSTER + ONE)
    return chosen(registry.read(tmp_path / "cluster.yaml"), None)


def test_nodes_answer_in_the_order_in_which_they_were_named_or_the_first_that_cannot_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, answers = one_environment(tmp_path), {"node1": "a", "node2": "b", "node3": ""}
    failed = session.NodeFailed("cannot connect")

    def run(node: Any, script: str, seconds: int) -> Any:
        if node.name == "node4":
            raise failed
        return SimpleNamespace(stdout=answers[node.name])

    monkeypatch.setattr(session, "run", run)
    nodes = [SimpleNamespace(name=f"node{number}") for number in (1, 2, 3, 4)]

    def each(look: Any, hosts: Any) -> Any:
        return {node.name: look(node) for node in hosts}

    reached: Any = SimpleNamespace(nodes=nodes, each=each)
    assert _asked(reached, ["node2", "node1"], one, "script") == ["b", "a"]
    with pytest.raises(EnvError, match="node3 has no environment main at /opt/lockstep/envs/main"):
        _asked(reached, ["node1", "node3"], one, "script")
    with pytest.raises(EnvError, match="node4 could not be looked at: cannot connect"):
        _asked(reached, ["node4"], one, "script")


def test_leftovers_are_told_by_their_reason_and_not_all_of_them(tmp_path: Path) -> None:
    one = one_environment(tmp_path)
    assert listing("node1", one, {}) == (
        "nothing in main on node1 names another place than /opt/lockstep/envs/main"
    )
    found = {f"conda-meta/{number:02}.json": "records of conda" for number in range(22)}
    lines = listing("node1", one, {**found, "x\udcff": "data"}).splitlines()
    assert lines[:2] == ["data:", "  'x\\udcff'"]
    assert lines[3:5] == ["records of conda:", "  conda-meta/00.json"]
    assert lines[-3] == "  and 2 more" and "conda-meta/20.json" not in "".join(lines)
    assert lines[-1].startswith("23 files in main on node1")
