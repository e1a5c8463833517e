"""What ``lockstep stop`` tells the nodes, and what it says when one of them cannot be told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import cli, jobs_cli
from inventory.cluster import Cluster
from roles import registry
from roles.core import session
from roles.job.probe import JobState

from .conftest import view

Nodes = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> Nodes:
    """Nodes with the given looks; returns every (node, command) that they are told, as it comes."""

    def make(error: str = "", **states: JobState) -> list[tuple[str, str]]:
        told: list[tuple[str, str]] = []
        hosts = [SimpleNamespace(name=name) for name in cluster.nodes]

        def each(what: Callable[[Any], Any], chosen: Sequence[Any] = hosts) -> dict[str, Any]:
            return {host.name: what(host) for host in chosen}

        @contextmanager
        def reach(_: Cluster) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(nodes=hosts, each=each)

        def run(host: Any, script: str, seconds: int) -> session.Output:
            told.append((host.name, script))
            if error:
                raise session.NodeFailed(error)
            return session.Output("", "")

        silent = {name: "cannot connect" for name in cluster.nodes if name not in states}
        # Not the module itself: importing it patches this process's threads for gevent.
        monkeypatch.setitem(sys.modules, "deploy.reach", SimpleNamespace(reach=reach))
        monkeypatch.setattr(registry, "declared", lambda: cluster)
        monkeypatch.setattr(session, "run", run)
        monkeypatch.setattr(jobs_cli, "look", lambda *_: jobs_cli.Seen(states, silent))
        return told

    return make


def test_the_mark_comes_first_then_the_units_end(nodes: Nodes) -> None:
    told = nodes(node1=view("node1"), node2=view("node2"))
    assert cli.main(["stop"]) == 0
    assert told[0] == ("node1", "set -e; : >/shared/runs/light/attempts/2/stopped")
    assert [name for name, script in told[1:] if "systemctl stop" in script] == ["node1", "node2"]


def test_the_mark_is_left_by_a_node_that_sees_the_run(nodes: Nodes) -> None:
    told = nodes(node1=view("node1", boot_id="x", units=(), attempt=None), node2=view("node2"))
    assert cli.main(["stop"]) == 0
    assert told[0][0] == "node2"


def test_a_mark_that_cannot_be_left_is_a_sentence_and_nothing_is_ended(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    told = nodes("Read-only file system", node1=view("node1"), node2=view("node2"))
    assert cli.main(["stop"]) == 1
    assert "cannot be written: Read-only file system" in capsys.readouterr().err
    assert len(told) == 1


def test_a_silent_node_is_told_by_exit_code_2(
    nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes(node1=view("node1"))
    assert cli.main(["stop"]) == 2
    assert "node2 did not answer" in capsys.readouterr().err
